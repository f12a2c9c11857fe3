"""Retires loaded files: the only code that deletes sealed data, once all of an unchanged file is committed.

removed        a loaded file
archived       a loaded file, if an archive is configured: <archive>/<day>/<name>.zst, readable by a backfill
kept whole     a file with a line that is too long for a reject: rejected/<stem>.whole

Archived and kept files contain nothing about erased people.

A segment that is being copied into the spool has its name before it has all its bytes. Loading is not
delayed, but removal is: until no process has the file open for writing, or it has not changed for a while
(see writing.py). If it has grown since, the new lines are loaded: it is read again, with a chunk boundary at
its previous end, so that the ledger recognizes the old chunks.

A sealed segment is complete if its writer held its lock while it was `.open`: only the writer, or a loader
after the writer's death, renames it, and both cut it first. So segments of other users, for which the kernel
refuses a lease, are removed immediately if a scan or hint saw them open before. Inode numbers are reused, so
the stem must match as well.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from loader.files import erase, nofollow, rejects
from loader.files.chunk import Chunk, Reading, chunks
from loader.files.content import unpacked
from loader.files.mentions import NOBODY, Latest, Mentions
from loader.files.scan import SCAN_FILES, Inode, Scan, locked_inode, scan
from loader.files.writing import is_complete, leased

SUFFIX: Final = ".zst"
_DAY: Final = len("20261123")
"""Length of the day at the beginning of a segment's name."""
_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 30.0
"""Seconds until a file that could not be loaded is retried."""


@dataclass(frozen=True)
class FileIdentity:
    """The identity of a file and its state when it was read."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class SpoolFile:
    """A sealed segment of the spool. It is retired when it is loaded; the ledger records its file name.

    The object is kept between scans while the file waits to be removed or to be loaded again.
    """

    def __init__(
        self, path: Path, archive: Path | None = None, open_inode: Inode | None = None,
        erased: Latest | None = None,
    ) -> None:  # fmt: skip
        self.name = path.name
        self._erased = erased or Latest()
        self.loaded = False
        self.retired = False
        self._path = path
        self._archive = archive
        self._open_inode = open_inode
        """Identity of the open file that its writer had locked under the same stem."""
        self._identity: FileIdentity | None = None
        self._since = time.monotonic()
        """When the state of the last read was first seen."""
        self._cuts: list[int] = []
        """Its sizes at previous loads."""
        self._oversize = False
        self._left_out = False
        """Whether its last line had no newline yet and was not loaded."""
        self._retry_at = 0.0
        """When to read it again: a growing file, or one that failed, is not read continuously."""
        self._retry_after = _FIRST_RETRY

    def open(self) -> BinaryIO:
        stream = nofollow.open_file(self._path)
        identity = FileIdentity.of(os.fstat(stream.fileno()))
        if identity != self._identity:
            self._identity, self._since = identity, time.monotonic()
        return stream

    def chunks(self, progressed: Callable[[], None] = lambda: None) -> Iterator[Chunk]:
        """Yield its chunks. After the complete lines before an error, raises one of UNREADABLE."""
        self.loaded, end, begun = False, 0, time.monotonic()
        with self.open() as stream:
            growing = not self._is_complete(stream.fileno(), ends_in_line=_ends_in_newline(stream))
            reading = Reading(cuts=tuple(self._cuts), growing=growing, progressed=progressed)
            reader = unpacked(stream, lambda multiple: _skip_hole(stream, multiple))
            for chunk in chunks(reader, self.name, reading=reading):
                end = chunk.offset + chunk.size
                yield chunk
            self._left_out = growing and reader.position > end
        if end and end not in self._cuts:
            self._cuts.append(end)
        self._retry_at = time.monotonic() + min(5 * (time.monotonic() - begun), _LONGEST_RETRY)

    def retire(self, *, oversize: bool) -> None:
        """Remove the file, or leave it for a later `settle`. Raises OSError."""
        self.loaded, self._oversize = True, oversize
        self.settle()

    def postpone(self) -> None:
        self._retry_at = time.monotonic() + self._retry_after
        self._retry_after = min(2 * self._retry_after, _LONGEST_RETRY)

    def settle(self) -> bool:
        """Remove the file if it is loaded and complete. Return whether it has to be loaded now.

        Raises OSError, for example if the directory is read-only.
        """
        if not self.loaded:
            return time.monotonic() >= self._retry_at
        assert self._identity is not None  # a loaded file has been opened
        with contextlib.suppress(FileNotFoundError), nofollow.open_file(self._path) as stream:
            if FileIdentity.of(os.fstat(stream.fileno())) != self._identity:
                return time.monotonic() >= self._retry_at
            if not self._is_complete(stream.fileno(), ends_in_line=not self._left_out):
                return False
            if self._left_out:
                return True
        mentions = self._erased.mentions
        self.retired = retire(self._path, self._identity, self._archive, mentions, whole=self._oversize)
        return not self.retired

    def _is_complete(self, fd: int, *, ends_in_line: bool) -> bool:
        status = os.fstat(fd)
        if ends_in_line and (status.st_dev, status.st_ino) == self._open_inode:
            return True
        return is_complete(fd, time.monotonic() - self._since, ends_in_line=ends_in_line)


class SpoolFiles:
    """The sealed files of a spool, kept between scans. To be used by one thread."""

    def __init__(
        self, directory: Path, archive: Path | None = None, adopt: Container[str] = (),
        erased: Latest | None = None,
    ) -> None:  # fmt: skip
        self._directory = directory
        self._erased = erased or Latest()
        self._archive = archive
        self._adopt = adopt
        self._kept: dict[str, SpoolFile] = {}
        """Files that still exist after they were read: loaded, or to be retried."""
        self._open: dict[str, Inode] = {}
        """Segments that were open in the last scan or later, by stem."""

    def note_open(self, path: Path) -> None:
        """Record a new open segment."""
        with contextlib.suppress(FileNotFoundError):
            if inode := locked_inode(path):
                self._open[path.stem] = inode

    def scan(self) -> tuple[Scan, list[SpoolFile]]:
        """Scan the spool; return the scan and the files to load, oldest first. Raises OSError for the directory."""
        failures: dict[str, str] = {}
        again = [file for file in self._kept.values() if self._settle(file, failures)]
        self._kept = {name: file for name, file in self._kept.items() if not file.retired}
        found = scan(self._directory, max(1, SCAN_FILES - len(self._kept)), self._kept, self._adopt)
        seen_open = self._open | found.open_inodes
        self._open = found.open_inodes
        new = [
            SpoolFile(path, self._archive, seen_open.get(path.stem), self._erased) for path in found.sealed
        ]
        self._kept |= {file.name: file for file in new}
        found.failures |= failures
        return found, sorted([*again, *new], key=lambda file: file.name)

    def unsettled(self) -> list[str]:
        """Return the names of loaded files to which a process may still append."""
        return [name for name, file in self._kept.items() if not file.retired and file.loaded]

    def _settle(self, file: SpoolFile, failures: dict[str, str]) -> bool:
        if file.retired or not os.path.lexists(self._directory / file.name):
            file.retired = True
            return False
        try:
            return file.settle()
        except OSError as error:
            failures[file.name] = f"is loaded, but could not be removed: {error}"
            return False


def retire(
    path: Path, loaded: FileIdentity, archive: Path | None = None, mentions: Mentions = NOBODY, *,
    whole: bool = False,
) -> bool:  # fmt: skip
    """Remove a loaded file, archive it or keep it whole; what is kept is without the people in `mentions`.

    Returns False if `path` now names a different or changed file; a file that no longer exists counts as
    retired. Raises OSError, for example if the directory is read-only.
    """
    try:
        if FileIdentity.of(os.lstat(path)) != loaded:
            return False
        if whole:
            with nofollow.opened(path.parent / rejects.DIRECTORY, create=True) as kept:
                name = _free_name(path, loaded, kept)
                if mentions:  # before the rename: after a crash it is still in the spool
                    with nofollow.opened(path.parent) as spool:
                        erase.sweep_file(spool, path.name, mentions, erase.Swept())
                os.rename(path, name, dst_dir_fd=kept)
            return True
        with nofollow.open_file(path) as stream:
            if archive is not None:
                if FileIdentity.of(os.fstat(stream.fileno())) != loaded:
                    return False
                _store(stream, archive, path.name, mentions)
            with leased(stream.fileno()):  # so that no process starts to append between the two calls
                if FileIdentity.of(os.lstat(path)) != loaded:
                    return False
                os.unlink(path)
    except FileNotFoundError:
        pass
    return True


def _free_name(path: Path, loaded: FileIdentity, directory: int) -> str:
    """Return an unused name for a file that is kept whole."""
    name = path.stem + rejects.WHOLE
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return name
    return f"{path.stem}-{loaded.inode}-{loaded.modified_ns}{rejects.WHOLE}"


def _ends_in_newline(stream: BinaryIO) -> bool:
    """Whether a file is empty or its last byte is a newline."""
    size = os.fstat(stream.fileno()).st_size
    return not size or os.pread(stream.fileno(), 1, size - 1) == b"\n"


def _skip_hole(stream: BinaryIO, multiple: int) -> int:
    """Skip a hole at the current position of a sparse file, in whole multiples; return the bytes skipped."""
    position = stream.tell()
    fd = stream.fileno()
    raw = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        data = os.lseek(fd, position, os.SEEK_DATA)
    except OSError:  # ENXIO: the hole extends to the end
        data = os.fstat(fd).st_size
    finally:
        os.lseek(fd, raw, os.SEEK_SET)
    skipped = max(0, data - position) // multiple * multiple
    stream.seek(position + skipped)
    return skipped


def _store(stream: BinaryIO, archive: Path, name: str, mentions: Mentions) -> None:
    """Write a compressed copy, durable on return. A crash leaves none, or one that is overwritten later."""
    with nofollow.opened(archive, create=True) as base:
        with nofollow.opened(name[:_DAY], base, create=True) as day:
            passing = f"{name}.part"
            with nofollow.create_file(passing, day) as copy:
                packer = zstandard.ZstdCompressor(write_checksum=True)
                if mentions:
                    with packer.stream_writer(copy, closefd=False) as packed:
                        erase.copy_without(unpacked(stream), packed, mentions, erase.Swept())
                else:
                    packer.copy_stream(stream, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.rename(passing, name + SUFFIX, src_dir_fd=day, dst_dir_fd=day)
            os.fsync(day)
        os.fsync(base)
