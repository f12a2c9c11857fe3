"""The only deletion of sealed data: a file goes once all of it is committed, if it is still that file.

removed        what was loaded
archived       the same, where an archive is wanted: <archive>/<day>/<name>.zst, for a backfill to read
kept whole     a file with a line that is too long for a reject: rejected/<stem>.whole
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from loader.files import nofollow, rejects

SUFFIX: Final = ".zst"
_DAY: Final = len("20261123")
"""Characters of a segment's name that are the day it was begun."""


@dataclass(frozen=True)
class FileIdentity:
    """Which file a path named, and its state when it was read."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class SpoolFile:
    """A sealed segment of the spool, retired when it is loaded; its ledger name is its file name."""

    def __init__(self, path: Path, archive: Path | None = None) -> None:
        self.name = path.name
        self._path = path
        self._archive = archive
        self._identity: FileIdentity | None = None

    def open(self) -> BinaryIO:
        stream = nofollow.open_file(self._path)
        self._identity = FileIdentity.of(os.fstat(stream.fileno()))
        return stream

    def retire(self, *, oversize: bool) -> None:
        assert self._identity is not None  # a file that is loaded was open
        if not retire(self._path, self._identity, self._archive, whole=oversize):
            raise OSError("it has changed since")


def retire(path: Path, loaded: FileIdentity, archive: Path | None = None, *, whole: bool = False) -> bool:
    """Remove a loaded file, archive it or keep it whole.

    False where `path` names another or a changed file now; one that is gone already is retired. Raises
    OSError, as for a directory that is read-only.
    """
    try:
        if FileIdentity.of(os.lstat(path)) != loaded:
            return False
        if whole:
            with nofollow.opened(path.parent / rejects.DIRECTORY, create=True) as kept:
                os.rename(path, path.stem + rejects.WHOLE, dst_dir_fd=kept)
            return True
        if archive is not None:
            with nofollow.open_file(path) as stream:
                if FileIdentity.of(os.fstat(stream.fileno())) != loaded:
                    return False
                _store(stream, archive, path.name)
        os.unlink(path)
    except FileNotFoundError:
        pass
    return True


def _store(stream: BinaryIO, archive: Path, name: str) -> None:
    """Write a compressed copy, durable on return; a crash leaves none, or one that is written again."""
    with nofollow.opened(archive, create=True) as base:
        with nofollow.opened(name[:_DAY], base, create=True) as day:
            passing = f"{name}.part"
            with nofollow.create_file(passing, day) as copy:
                zstandard.ZstdCompressor(write_checksum=True).copy_stream(stream, copy)
                copy.flush()
                os.fsync(copy.fileno())
            os.rename(passing, name + SUFFIX, src_dir_fd=day, dst_dir_fd=day)
            os.fsync(day)
        os.fsync(base)
