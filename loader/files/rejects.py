"""Reject files: rejected lines, each with its reason, under the spool's `rejected/`.

    rejected/<stem>-<offset>-<digest>.ndjson   the rejects of the chunk with these bytes at <offset> of <stem>
    rejected/<stem>.whole                      a file with a line longer than a chunk, kept whole

A file is written under a temporary name of its own, synced and renamed before the COMMIT of its chunk, so
after a crash in between it is simply written again. It is never appended to and never replaces the rejects of
other lines: two files with the same base name have different chunks, or the ledger already has the second
one's.

A reject is bounded by its line: its reason has at most REASON_CHARACTERS, including quotations.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import orjson

from loader.errors import DamagedFileError
from loader.files import nofollow
from loader.files.limits import CHUNK_BYTES, CHUNK_LINES

if TYPE_CHECKING:
    from loader.files.chunk import Chunk

DIRECTORY: Final = "rejected"
WHOLE: Final = ".whole"
REASON_CHARACTERS: Final = 500
_LONGEST_LINE: Final = 16 * CHUNK_BYTES
"""A line of chunk size with each byte escaped (six bytes for a control character), and room for its reason."""
_DIGEST_CHARACTERS: Final = 12
_LEFT_SECONDS: Final = 3600.0
"""Age in seconds from which a temporary file counts as left by a crash."""
_SUFFIXES: Final = (".gz", ".zst", ".ndjson", ".jsonl")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True)
class Rejected:
    """A rejected line: its file and line number (from 1), code, reason and bytes."""

    file: str
    line: int
    code: str
    reason: str
    raw: bytes

    def encode(self) -> bytes:
        """Return the line of a reject file. A line that is not UTF-8 is stored as `raw_base64`."""
        reason = self.reason
        if len(reason) > REASON_CHARACTERS:
            reason = reason[: REASON_CHARACTERS - 3] + "..."
        wrapped: dict[str, object] = {
            "file": self.file, "line": self.line, "code": self.code, "reason": reason,
        }  # fmt: skip
        try:
            wrapped["raw"] = self.raw.decode()
        except UnicodeDecodeError:
            wrapped["raw_base64"] = base64.b64encode(self.raw).decode()
        return orjson.dumps(wrapped, option=orjson.OPT_APPEND_NEWLINE)


_TYPES: Final = {"file": str, "line": int, "code": str, "reason": str}
_RAW: Final = ("raw", "raw_base64")


def decode(line: bytes) -> Rejected:
    """Decode a line written by `Rejected.encode`. Raises ValueError for other input."""
    wrapped = orjson.loads(line)  # importing msgspec would take as long as `loader status` takes to count
    if not _is_wrapped(wrapped):
        raise ValueError("it lacks a value, or has one of another type")
    encoded = wrapped.get("raw_base64")
    raw = wrapped["raw"].encode() if encoded is None else base64.b64decode(encoded)
    return Rejected(**{name: wrapped[name] for name in _TYPES}, raw=raw)


def _is_wrapped(wrapped: object) -> bool:
    return (
        isinstance(wrapped, dict)
        and all(type(wrapped.get(name)) is kind for name, kind in _TYPES.items())
        and any(isinstance(wrapped.get(name), str) for name in _RAW)
        and all(isinstance(wrapped.get(name, ""), str | None) for name in _RAW)
    )


class CannotWriteError(OSError):
    """Rejects could not be written, for example because the disk is full."""


def read(path: Path) -> Iterator[Rejected]:
    """Yield the rejects of a file. Raises OSError, and ValueError that names the file and the line."""
    with nofollow.opened(path.parent) as fd, nofollow.open_file(path.name, fd) as stream:
        for number in itertools.count(1):
            if not (line := stream.readline(_LONGEST_LINE)):
                return
            try:
                yield decode(line)
            except ValueError as error:
                raise DamagedFileError(
                    f"{path}, line {number}: not a reject line: {error}; move it away"
                ) from None


def files(spool: Path) -> list[Path]:
    """Return the reject files of a spool, oldest first. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), nofollow.opened(spool / DIRECTORY) as fd:
        return [spool / DIRECTORY / name for name in nofollow.names(fd, (".ndjson",))]
    return []


def count(paths: Iterable[Path]) -> Counter[str]:
    """Return how many rejects the files hold, by code. Raises OSError, ValueError."""
    return Counter(rejected.code for path in paths for rejected in read(path))


def write(spool: Path, chunk: Chunk, rejects: Sequence[Rejected]) -> None:
    """Write the rejects of a chunk, replacing those of an interrupted load.

    Raises CannotWriteError.
    """
    name = f"{stem_of(chunk.file)}-{chunk.offset}-{chunk.digest.hex()[:_DIGEST_CHARACTERS]}.ndjson"
    try:
        replace(spool / DIRECTORY / name, rejects)
    except OSError as error:
        raise CannotWriteError(error.errno, error.strerror, error.filename) from error


def replace(path: Path, rejects: Sequence[Rejected]) -> None:
    """Replace `path` by a file of these rejects, or remove it if there are none, durably. Raises OSError."""
    if not rejects and not os.path.lexists(path):
        return
    with replacing(path) as stream:
        stream.writelines(rejected.encode() for rejected in rejects)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose lines durably replace `path` after the block; without lines, `path` is removed.

    Each call writes to a temporary name of its own, because two loaders may write the rejects of the same
    lines at the same time. If the block raises, `path` is unchanged. Raises OSError.
    """
    temporary = f"{path.name.removesuffix('.ndjson')}.{secrets.token_hex(4)}.part"
    with nofollow.opened(path.parent, create=True) as fd:
        try:
            with nofollow.create_file(temporary, fd) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                is_empty = not stream.tell()
            os.rename(temporary, path.name, src_dir_fd=fd, dst_dir_fd=fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=fd)
            raise
        if is_empty:
            os.unlink(path.name, dir_fd=fd)
        os.fsync(fd)


def pieces(path: Path) -> Iterator[list[Rejected]]:
    """Yield lists of a file's rejects, each of at most the size of a chunk; a larger reject is alone.

    Raises the same errors as `read`.
    """
    piece: list[Rejected] = []
    size = 0
    for rejected in read(path):
        if piece and (size + len(rejected.raw) > CHUNK_BYTES or len(piece) == CHUNK_LINES):
            yield piece
            piece, size = [], 0
        piece.append(rejected)
        size += len(rejected.raw)
    if piece:
        yield piece


def remove_leftovers(spool: Path) -> None:
    """Remove temporary files left by a crash. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), nofollow.opened(spool / DIRECTORY) as fd:
        for name in nofollow.names(fd, (".part",)):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime > _LEFT_SECONDS:
                    os.unlink(name, dir_fd=fd)


def stem_of(file: str) -> str:
    """Return the name of a loaded file without suffixes and without characters that a file name cannot have."""
    name = os.path.basename(file)
    while name.endswith(_SUFFIXES):
        name = os.path.splitext(name)[0]
    return _UNSAFE.sub("_", name).lstrip(".")[:150] or "stdin"
