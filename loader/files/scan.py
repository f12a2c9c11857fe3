"""Scans a spool for sealed segments, oldest first, and seals the segments of dead writers.

Only regular files with a segment name are opened. Links are not followed; all other entries are reported,
never opened.

A scan is bounded: it returns at most SCAN_FILES of the oldest files, and `more` if there are others. Of
200,000 files it keeps only these names, and calls lstat(2) only on open segments.
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
"""In bytes. A reserved segment has no holes, unless its file system cannot reserve space and the file grows."""
STALE_SECONDS: Final = 300.0
"""Seconds after which a segment with lines should have been sealed: many times SPOOL_MAX_AGE."""


Inode = tuple[int, int]
"""The device and the inode of a file."""


@dataclass
class Scan:
    """The result of one scan of a spool. `skipped` maps names to the reason for skipping them."""

    sealed: list[Path] = field(default_factory=list)
    more: bool = False
    """Whether there are sealed files that are not in `sealed`."""
    adopted: list[Path] = field(default_factory=list)
    unsettled: int = 0
    """Open segments that are adopted later, unless they change: they may be copies in progress."""
    torn_bytes: int = 0
    open_inodes: dict[str, Inode] = field(default_factory=dict)
    """Device and inode of the open segments locked by a writer, by stem."""
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Failed operations on files that were loaded before."""

    def skip(self, name: str, reason: str) -> None:
        if len(self.skipped) < _REPORTED_NAMES:
            self.skipped[name] = reason
        else:
            self.skipped["another name"] = "there are more than 100 of these"


def scan(
    directory: Path, limit: int = SCAN_FILES, known: Container[str] = (), adopt: Container[str] = ()
) -> Scan:
    """Scan all entries once, skipping `known` names. Raises OSError for the directory itself.

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
                found.skip(name, "not a segment file name")
            elif not entry.is_file(follow_symlinks=False):
                found.skip(name, "not a regular file")
            elif name.endswith(SEALED) or (name := adopter.adopt(name, found)).endswith(SEALED):
                candidates.append(name)
            if len(candidates) >= 2 * limit:
                candidates, found.more = heapq.nsmallest(limit, candidates), True
    candidates.sort()
    found.more |= len(candidates) > limit
    found.sealed = [directory / name for name in candidates[:limit]]
    return found


class Adopter:
    """Adopts the segments of dead writers in a spool, by sealing them."""

    def __init__(self, directory: Path, hosts: Container[str] = ()) -> None:
        self._directory = directory
        self._hosts = hosts
        self._network = network_type(directory)
        self._here = Writer.here()

    def adopt(self, name: str, found: Scan) -> str:
        """Seal a segment if its writer is dead; return its current name."""
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
            return name  # sealed by its writer in the meantime
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
        """Return why a segment is never adopted here, or None if it may be adopted once its writer is dead."""
        writer = SegmentName.parse(os.path.splitext(name)[0])
        if writer is not None and self._network and self._may_be_out_of_reach(writer):
            return (
                f"host {writer.host} may be writing it, and a lock on {self._network} may not reach this host; once "
                f"its writers have ended, run there, or here: `loader run --once --adopt {writer.host}`"
            )
        status = os.lstat(self._directory / name)
        if status.st_size > max(_LARGEST_HOLE, 1024 * status.st_blocks):
            return "it is a sparse file, unlike any segment: remove it, or cut it with `truncate`"
        return None

    def _may_be_out_of_reach(self, writer: SegmentName) -> bool:
        here = self._here
        return writer.boot != here.boot and writer.host != here.host and writer.host not in self._hosts

    def _is_complete(self, path: Path) -> bool:
        """Whether the segment is not a copy in progress. Sealing an unfinished copy would lose lines."""
        try:
            with nofollow.open_file(path) as stream:
                return is_complete(stream.fileno()) or _has_all_lines(stream.fileno())
        except PermissionError:
            return True  # the attempt to seal it reports why it cannot be read


def _has_all_lines(fd: int) -> bool:
    """Whether zeros follow the last line, as in a reserved segment, and no process is known to have the file open."""
    size = os.fstat(fd).st_size
    with leased(fd) as writing:
        return writing is not Writing.SOMEBODY and size > 0 and os.pread(fd, 1, size - 1) == b"\0"


def locked_inode(path: Path) -> Inode | None:
    """Return the device and inode of a segment locked by its writer, or None if it is not locked.

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
        pass  # the attempt to seal it reports why it cannot be opened
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
    """The backlog of a spool. `lag_seconds` is the age of the oldest sealed segment, or 0 if there is none."""

    open_segments: int
    stale_segments: int
    """Open segments with lines that should have been sealed by now: some process holds them."""
    sealed_files: int
    sealed_bytes: int
    lag_seconds: float


def backlog(directory: Path) -> Backlog:
    """Measure the backlog of a spool without changing it. Raises OSError."""
    open_segments = stale = files = size = 0
    now = oldest = time.time()
    for name in segment_names(directory):
        with contextlib.suppress(FileNotFoundError):  # loaded in the meantime
            if name.endswith(OPEN):
                open_segments += 1
                stale += is_stale(directory / name)
            else:
                status = os.lstat(f"{directory}/{name}")  # not a Path, because it would intern each name
                files, size, oldest = files + 1, size + status.st_size, min(oldest, status.st_mtime)
    return Backlog(open_segments, stale, files, size, round(max(0.0, now - oldest), 3))


def is_stale(path: Path) -> bool:
    """Whether an open segment has lines and has not changed for STALE_SECONDS. Raises OSError."""
    status = os.lstat(path)
    if time.time() - status.st_mtime < STALE_SECONDS:
        return False
    try:
        with nofollow.open_file(path) as stream:
            return stream.read(1).strip(b"\0") != b""
    except PermissionError:
        return True
