"""Which files: the sealed segments of a spool, oldest first, and the dead writers' ones, sealed here.

A name says nothing before its file was looked at: only a regular file under a segment's name is touched,
links are not followed, and everything else is reported, never opened.

A scan is bounded: it returns at most SCAN_FILES of the oldest files, and `more` if there are others. Of
200,000 files it keeps the names of those, and calls lstat(2) on none but open segments.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from loader.files import nofollow
from loader.files.filesystem import network_type
from loader.files.writing import Writing, is_complete, is_locked, leased
from spool.segment import OPEN, SEALED, SegmentName, Writer, recover

SCAN_FILES: Final = 10_000
_REPORTED_NAMES: Final = 100
_LARGEST_HOLE: Final = 1 << 30
"""Bytes; a segment is reserved, so it has no holes, except on file systems that cannot, where it grows."""
STALE_SECONDS: Final = 300.0
"""Seconds after which a segment with lines should be sealed: many times SPOOL_MAX_AGE."""


Inode = tuple[int, int]
"""The device and the inode of a file."""


@dataclass
class Scan:
    """What one scan of a spool found. `skipped` maps a name to why it was not touched."""

    sealed: list[Path] = field(default_factory=list)
    more: bool = False
    """Whether there are sealed files that are not in `sealed`."""
    adopted: list[Path] = field(default_factory=list)
    unsettled: int = 0
    """Open segments that are adopted later, unless they change: they may be copies in the making."""
    torn_bytes: int = 0
    open_inodes: dict[str, Inode] = field(default_factory=dict)
    """Device and inode of the open segments that a writer has locked, by stem."""
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """What could not be done about a file that was loaded before."""

    def skip(self, name: str, reason: str) -> None:
        if len(self.skipped) < _REPORTED_NAMES:
            self.skipped[name] = reason
        else:
            self.skipped["another name"] = "there are more than 100 of these"


def scan(
    directory: Path, limit: int = SCAN_FILES, known: Container[str] = (), adopt: Container[str] = ()
) -> Scan:
    """Look at every entry once; `known` names are passed over. Raises OSError for the directory itself.

    On a network file system, segments of other hosts are adopted only if they are those named in `adopt`.
    """
    found = Scan()
    adopter = Adopter(directory, adopt)
    candidates: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            if not name.endswith((OPEN, SEALED)) or name in known:
                continue
            if SegmentName.parse(os.path.splitext(name)[0]) is None:
                found.skip(name, "its name is not a segment's")
            elif not entry.is_file(follow_symlinks=False):
                found.skip(name, "it is not a regular file")
            elif name.endswith(SEALED) or (name := adopter.adopt(name, found)).endswith(SEALED):
                candidates.append(name)
            if len(candidates) >= 2 * limit:
                candidates, found.more = heapq.nsmallest(limit, candidates), True
    candidates.sort()
    found.more |= len(candidates) > limit
    found.sealed = [directory / name for name in candidates[:limit]]
    return found


class Adopter:
    """Seals the segments of dead writers in a spool."""

    def __init__(self, directory: Path, hosts: Container[str] = ()) -> None:
        self._directory = directory
        self._hosts = hosts
        self._network = network_type(directory)
        self._here = Writer.here()

    def adopt(self, name: str, found: Scan) -> str:
        """Seal a segment whose writer is dead; return its name, which is another one then."""
        path = self._directory / name
        try:
            if reason := self.why_not(name):
                found.skip(name, reason)
                return name
            if inode := locked_inode(path):
                found.open_inodes[path.stem] = inode
                return name
            if not self._is_complete(path):
                found.unsettled += 1
                return name
            sealed = recover(path)
        except FileNotFoundError:
            return name  # its writer sealed it in the meantime
        except OSError as error:
            found.skip(name, str(error.strerror))
            return name
        if sealed is None:
            return name
        found.torn_bytes += sealed.torn_bytes
        if sealed.path is None:
            return name
        found.adopted.append(sealed.path)
        return sealed.path.name

    def why_not(self, name: str) -> str | None:
        """Return why a segment is never adopted here, None if it may be once its writer is dead."""
        writer = SegmentName.parse(os.path.splitext(name)[0])
        if writer is not None and self._network and self._may_be_out_of_reach(writer):
            return (
                f"host {writer.host} may be writing it, and a lock on {self._network} may not reach this host; once "
                f"its writers have ended, run there, or here: `loader run --once --adopt {writer.host}`"
            )
        status = os.lstat(self._directory / name)
        if status.st_size > max(_LARGEST_HOLE, 1024 * status.st_blocks):
            return "it is a sparse file, which no segment is: remove it, or cut it with `truncate`"
        return None

    def _may_be_out_of_reach(self, writer: SegmentName) -> bool:
        here = self._here
        return writer.boot != here.boot and writer.host != here.host and writer.host not in self._hosts

    def _is_complete(self, path: Path) -> bool:
        """Whether it is not a copy that is still being made. A copy that is cut short would lose lines."""
        try:
            with nofollow.open_file(path) as stream:
                return is_complete(stream.fileno()) or _has_all_lines(stream.fileno())
        except PermissionError:
            return True  # why it cannot be read is reported by who seals it


def _has_all_lines(fd: int) -> bool:
    """Whether zeros follow the last line, as in a reserved segment, and nobody is known to write it."""
    size = os.fstat(fd).st_size
    with leased(fd) as writing:
        return writing is not Writing.SOMEBODY and size > 0 and os.pread(fd, 1, size - 1) == b"\0"


def locked_inode(path: Path) -> Inode | None:
    """Return the device and inode of a segment that its writer has locked, None if it is not locked.

    Raises FileNotFoundError.
    """
    try:
        with nofollow.open_file(path) as stream:
            if is_locked(stream.fileno()):
                status = os.fstat(stream.fileno())
                return status.st_dev, status.st_ino
    except FileNotFoundError:
        raise
    except OSError:
        pass  # why it cannot be opened is reported by who seals it
    return None


def segment_names(directory: Path) -> Iterator[str]:
    """Yield the names of the segments, open and sealed. Raises OSError."""
    with os.scandir(directory) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix in (OPEN, SEALED) and SegmentName.parse(stem) is not None:
                yield entry.name


@dataclass(frozen=True)
class Backlog:
    """What waits in a spool. `lag_seconds` is the age of the oldest sealed segment, 0 where there is none."""

    open_segments: int
    stale_segments: int
    """Open segments that have lines and should have been sealed by now: something holds them."""
    sealed_files: int
    sealed_bytes: int
    lag_seconds: float


def backlog(directory: Path) -> Backlog:
    """Look at a spool, touching nothing. Raises OSError."""
    open_segments = stale = files = size = 0
    now = oldest = time.time()
    for name in segment_names(directory):
        with contextlib.suppress(FileNotFoundError):  # loaded in the meantime
            if name.endswith(OPEN):
                open_segments += 1
                stale += is_stale(directory / name)
            else:
                status = os.lstat(f"{directory}/{name}")  # not a Path, which would intern each name
                files, size, oldest = files + 1, size + status.st_size, min(oldest, status.st_mtime)
    return Backlog(open_segments, stale, files, size, round(max(0.0, now - oldest), 3))


def is_stale(path: Path) -> bool:
    """Whether an open segment has lines and has not changed for long. Raises OSError."""
    status = os.lstat(path)
    if time.time() - status.st_mtime < STALE_SECONDS:
        return False
    try:
        with nofollow.open_file(path) as stream:
            return stream.read(1).strip(b"\0") != b""
    except PermissionError:
        return True
