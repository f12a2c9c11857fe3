"""Removes erased people from files: searches every byte, and rewrites the files that contain one of their ids.

A file is rewritten under a temporary name, synced and renamed, with the original times, mode and owner; after a
crash it is either the old or the new file. A compressed file stays compressed. Lines keep their number and length
(see mentions.py), so a replay finds the same chunks and offsets.

Only files inside the given directory are modified, and no link is followed.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol, Self

import orjson
import zstandard

from loader.files import nofollow
from loader.files.content import UNREADABLE, Reader, unpacked
from loader.files.mentions import OVERLAP, Mentions, erased_line


class Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...


_Packer = AbstractContextManager[Writable]
STATE: Final = ".erasures"
"""The erasures that were applied to the files of a directory, and their keys: a copy of the tombstones."""
PART: Final = ".part"
_BLOCK: Final = 1 << 20
_LONG_LINE: Final = 16 << 20
"""Size in bytes from which a line is buffered in a temporary file until all of it has been searched."""
_ATTEMPTS: Final = 5
_LARGEST_HOLE: Final = 1 << 30
_STATE_BYTES: Final = 1 << 28
_PACKERS: Final[dict[bytes, Callable[[BinaryIO], _Packer]]] = {
    b"\x28\xb5\x2f\xfd": lambda file: zstandard.ZstdCompressor(write_checksum=True).stream_writer(
        file, closefd=False
    ),
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="wb", mtime=0),
    b"BZh": lambda file: bz2.BZ2File(file, "wb"),
    b"\xfd7zXZ\0": lambda file: lzma.LZMAFile(file, "wb"),  # noqa: SIM115  # the caller closes it
}
"""The compressor for a rewritten file, by the first bytes of the file."""


class ChangedError(OSError):
    """Another process changed a file while it was being rewritten."""


@dataclass
class Swept:
    """The result for the files of a directory, or of a dry run. `failures` maps each unchanged file to the reason."""

    lines: int = 0
    """Lines that were erased."""
    mentions: int = 0
    """Lines of other people in which an id was replaced."""
    files: int = 0
    bytes: int = 0
    """Bytes that were searched, after decompression."""
    hits: int = 0
    """Files in which an id was found."""
    found: list[str] = field(default_factory=list)
    """The names of these files; only `search` fills it."""
    failures: dict[str, str] = field(default_factory=dict)

    def __iadd__(self, other: Swept) -> Self:
        for name in ("lines", "mentions", "files", "bytes", "hits"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures |= other.failures
        self.found += other.found
        return self


def sweep(root: Path, mentions: Mentions, *, dry_run: bool = False) -> Swept:
    """Remove people from all files below a directory. A missing directory counts as empty."""
    swept = Swept()
    for directory, name, shown in walk(root, swept):
        with noting(swept, shown):
            sweep_file(directory, name, mentions, swept, dry_run=dry_run)
    return swept


def walk(root: Path, swept: Swept) -> Iterator[tuple[int, str, str]]:
    """Yield the directory, the name and the relative path of each file below a directory; no link is followed."""
    with noting(swept, str(root)), nofollow.opened(root) as base:
        for parent, _, names, directory in os.fwalk(".", dir_fd=base, follow_symlinks=False):
            for name in sorted(names):
                with contextlib.suppress(FileNotFoundError):
                    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                        continue
                yield directory, name, os.path.normpath(os.path.join(parent, name))


def search(root: Path, mentions: Mentions, but: tuple[str, ...] = ()) -> Swept:
    """Search every file below a directory without changing it. `but` names subdirectories to skip."""
    swept = Swept()
    for directory, name, shown in walk(root, swept):
        if shown.split("/", 1)[0] in but and "/" in shown:
            continue
        with noting(swept, shown), nofollow.open_file(name, directory) as file:
            found = is_found(file, mentions, swept) or mentions.in_text(name)
            swept.hits += found
            if found:
                swept.found.append(shown)
    return swept


def sweep_named(root: Path, suffixes: tuple[str, ...], mentions: Mentions, *, dry_run: bool = False) -> Swept:
    """Do as `sweep`, but only for files directly in the directory whose name ends in one of `suffixes`."""
    swept = Swept()
    with noting(swept, str(root)), nofollow.opened(root) as base:
        for name in nofollow.names(base, suffixes):
            with noting(swept, name):
                sweep_file(base, name, mentions, swept, dry_run=dry_run)
    return swept


def sweep_file(directory: int, name: str, mentions: Mentions, swept: Swept, *, dry_run: bool = False) -> None:
    """Remove people from one file. Raises OSError, and UNREADABLE if the file cannot be read to its end."""
    for _ in range(_ATTEMPTS):  # a loader may remove the same people from it at the same time
        with contextlib.suppress(ChangedError), nofollow.open_file(name, directory) as file:
            found = is_found(file, mentions, swept)
            file.seek(0)
            if found and dry_run:
                for _ in lines_without(unpacked(file), mentions, swept):
                    pass
            elif found and name.endswith(
                PART
            ):  # left by an interrupted process, or in use by one that will retry
                os.unlink(name, dir_fd=directory)
            elif found:
                _write_again(file, directory, name, mentions, swept)
            break
    else:
        raise ChangedError("keeps changing: run `loader erase --again`")
    named = mentions.in_text(name)
    if named and not dry_run and not name.endswith(PART):
        _rename(directory, name, mentions)
    swept.hits += found or named
    swept.files += found or named


def is_found(file: BinaryIO, mentions: Mentions, swept: Swept) -> bool:
    """Whether a file contains any of the ids. Reads up to the first match. Raises OSError, UNREADABLE."""
    status = os.fstat(file.fileno())
    if status.st_size > max(_LARGEST_HOLE, 1024 * status.st_blocks):
        raise OSError("is a sparse file, so it is not a segment: remove it, or shorten it with `truncate`")
    reader, before = unpacked(file), b""
    while piece := reader.read(_BLOCK):
        swept.bytes += len(piece)
        if mentions.concern(before + piece):
            return True
        before = (before + piece)[-OVERLAP:]
    return False


def _write_again(file: BinaryIO, directory: int, name: str, mentions: Mentions, swept: Swept) -> None:
    head = os.pread(file.fileno(), 8, 0)
    pack = next((pack for begin, pack in _PACKERS.items() if head.startswith(begin)), None)
    written = Swept()
    with replacing(file, directory, name) as copy:
        write_without(unpacked(file), copy, pack, mentions, written)
    swept += written


@contextlib.contextmanager
def replacing(file: BinaryIO, directory: int, name: str) -> Iterator[BinaryIO]:
    """Yield a stream whose content durably replaces an open file and keeps its mode, owner and times.

    If the block raises, or the file was changed in the meantime, it is left unchanged. Raises OSError.
    """
    status = os.fstat(file.fileno())
    temporary = f"{name}.{secrets.token_hex(4)}{PART}"
    try:
        with nofollow.create_file(temporary, directory) as copy:
            yield copy
            copy.flush()
            os.fchmod(copy.fileno(), stat.S_IMODE(status.st_mode))
            with contextlib.suppress(PermissionError):  # the file of another member of the group
                os.fchown(copy.fileno(), status.st_uid, status.st_gid)
            os.utime(
                copy.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns)
            )  # prune removes files by their age
            os.fsync(copy.fileno())
        now = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (status.st_ino, status.st_size, status.st_mtime_ns):
            raise ChangedError("was changed in the meantime: run `loader erase --again`")
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


def write_without(
    reader: Reader, target: BinaryIO, pack: Callable[[BinaryIO], _Packer] | None, mentions: Mentions, swept: Swept,
) -> None:  # fmt: skip
    """Write the lines without the mentioned people, compressed by `pack`. Raises UNREADABLE."""
    if pack is None:
        copy_without(reader, target, mentions, swept)
    else:
        with pack(target) as packed:
            copy_without(reader, packed, mentions, swept)


def copy_without(reader: Reader, target: Writable, mentions: Mentions, swept: Swept) -> None:
    """Do as `write_without`, to a target that may compress by itself."""
    for piece in lines_without(reader, mentions, swept):
        target.write(piece)  # python-zstandard has no writelines


def lines_without(reader: Reader, mentions: Mentions, swept: Swept) -> Iterator[bytes]:
    """Yield the lines without the mentioned people, as blocks of bytes. Raises UNREADABLE."""
    rest = b""
    while True:
        piece = reader.read(_BLOCK)
        data = rest + piece
        end = data.rfind(b"\n") + 1 if piece else len(data)
        if end:
            yield _kept(data[:end], mentions, swept)
            rest = data[end:]
        elif len(data) >= _LONG_LINE and piece:
            rest = yield from _long_line(data, reader, mentions, swept)
        else:
            rest = data
        if not piece:
            return


def _kept(lines: bytes, mentions: Mentions, swept: Swept) -> bytes:
    if not mentions.concern(lines):
        return lines
    return b"".join(_kept_line(line, mentions, swept) for line in lines.splitlines(keepends=True))


def _kept_line(line: bytes, mentions: Mentions, swept: Swept) -> bytes:
    content = line.rstrip(b"\r\n")
    kept = mentions.applied(content)
    if kept is content:
        return line
    if kept is None:
        swept.lines += 1
        kept = erased_line(len(content))
    else:
        swept.mentions += 1
    return kept + line[len(content) :]


def _long_line(
    begin: bytes, reader: Reader, mentions: Mentions, swept: Swept
) -> Generator[bytes, None, bytes]:
    """Yield a line of any length, or an erased line of the same length; return the bytes read after it."""
    with tempfile.TemporaryFile() as line:
        before, piece, rest, found = b"", begin, b"", False
        while piece:
            end = piece.find(b"\n") + 1
            used, rest = (piece[:end], piece[end:]) if end else (piece, b"")
            found = found or mentions.concern(before + used)
            line.write(used)
            if end:
                break
            before = (before + used)[-OVERLAP:]
            piece = reader.read(_BLOCK)
        size = line.tell()
        line.seek(0)
        if found:
            swept.lines += 1
            has_end = bool(piece)
            yield erased_line(len(begin))
            for place in range(len(begin), size - has_end, _BLOCK):
                yield b" " * min(_BLOCK, size - has_end - place)
            yield b"\n" * has_end
        else:
            while content := line.read(_BLOCK):
                yield content
    return rest


def _rename(directory: int, name: str, mentions: Mentions) -> None:
    """Replace the ids in the name of a file."""
    new = mentions.redacted(name.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")
    with contextlib.suppress(FileNotFoundError):
        os.stat(new, dir_fd=directory, follow_symlinks=False)
        new = f"{new}.{secrets.token_hex(4)}"
    os.rename(name, new, src_dir_fd=directory, dst_dir_fd=directory)


@contextlib.contextmanager
def noting(swept: Swept, name: str) -> Iterator[None]:
    """Record why a file cannot be read or written, and continue; ignore one that no longer exists."""
    try:
        yield
    except FileNotFoundError:
        pass
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error)
        swept.failures[name] = f"could not be searched to its end: {reason}"


# ---- applied erasures ----------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Erasures that were applied to a directory: the keys of their hashes, and the kind of each by its hash."""

    keys: frozenset[bytes] = frozenset()
    kinds: dict[bytes, str] = field(default_factory=dict)


def state(root: Path) -> State:
    """Return the erasures that were applied to a directory. Raises OSError.

    The result is empty if the state file is missing or damaged, belongs to another user, or is writable by others:
    anyone who can write to a spool could otherwise create one and have other people erased.
    """
    try:
        with nofollow.opened(root) as base, nofollow.open_file(STATE, base) as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid(), os.fstat(base).st_uid) or status.st_mode & 0o022:
                return State()
            written = orjson.loads(file.read(_STATE_BYTES))
            keys = frozenset(bytes.fromhex(key) for key in written["keys"])
            kinds = {bytes.fromhex(subject): str(kind) for subject, kind in written["subjects"].items()}
            return State(keys, kinds)
    except (FileNotFoundError, PermissionError, ValueError, TypeError, KeyError, AttributeError):
        return State()


def write_state(root: Path, applied: State) -> None:
    """Record durably which erasures were applied to a directory, readable by its owner only. Raises OSError."""
    content = orjson.dumps(
        {
            "keys": sorted(key.hex() for key in applied.keys),
            "subjects": {subject.hex(): kind for subject, kind in sorted(applied.kinds.items())},
        }
    )
    temporary = f"{STATE}.{secrets.token_hex(4)}{PART}"
    with nofollow.opened(root) as base:
        try:
            with nofollow.create_file(temporary, base) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, STATE, src_dir_fd=base, dst_dir_fd=base)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=base)
            raise
        os.fsync(base)
