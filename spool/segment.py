"""A segment: one file of lines, written by one process, whose name is its state.

    <stem>.open     preallocated and being written; its writer holds an exclusive flock on it
    <stem>.ndjson   sealed: cut to its last complete line, immutable

    <stem> = 20261123T120000.000000Z-host-boot-pid-random-000001

This room never parses JSON: it knows only the newline, and that a line has no NUL byte.

Why appending needs no lock: `mmap.write` copies the bytes and moves the position inside one C call that
keeps the GIL, so no thread, signal handler or finalizer can come between (CPython, Modules/mmapmodule.c).
Closing the map makes every later write raise ValueError, so a writer that still holds a retired segment is
told so and takes the next one. What was written is then found from the file itself, exactly as after a crash:
sealing and recovery are one function.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from spool.reentry import ReentryLock

OPEN: Final = ".open"
SEALED: Final = ".ndjson"
DEFAULT_DIRECTORY: Final = Path("/var/spool/analytics")
FILE_MODE: Final = 0o640
"""The loader reads the files as a member of their group."""
DIRECTORY_MODE: Final = 0o770
MODE: Final = FILE_MODE
STEM: Final = re.compile(
    r"(?P<moment>[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)"
    r"-(?P<host>[A-Za-z0-9.-]{1,64})-(?P<boot>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})-(?P<token>[0-9a-f]{8})"
    r"-(?P<number>[0-9]{6}|[1-9][0-9]{6,17})"
)
_BLOCK: Final = 1 << 20
"""Bytes per read: with busy threads beside it, getting the GIL back after each costs milliseconds."""
_UNSUPPORTED: Final = frozenset({errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What some network and FUSE file systems answer to reserving or mapping (posix_fallocate(3), mmap(2))."""
_MADV_POPULATE_WRITE: Final = 23  # Python has no name for it


@dataclass(frozen=True)
class SegmentName:
    """The parts of a segment's stem. `number` counts the segments of one writer from 1."""

    moment: str
    """When the segment was created, in UTC, as `20261123T120000.000000Z`."""
    host: str
    boot: str
    pid: int
    token: str
    number: int

    @classmethod
    def parse(cls, stem: str) -> SegmentName | None:
        """Return the parts of a file name without its suffix, or None if it is not a segment's."""
        found = STEM.fullmatch(stem)
        if found is None or int(found["number"]) == 0:
            return None
        return cls(
            found["moment"], found["host"], found["boot"], int(found["pid"]), found["token"],
            int(found["number"]),
        )  # fmt: skip

    @property
    def writer(self) -> str:
        """Who wrote it: host, boot, pid and token."""
        return f"{self.host}-{self.boot}-{self.pid}-{self.token}"

    @property
    def stem(self) -> str:
        return f"{self.moment}-{self.writer}-{self.number:06d}"


class Writer(NamedTuple):
    """Who writes: two containers may share a pid and a directory, so a random part is added."""

    host: str
    boot: str
    pid: int
    token: str

    @classmethod
    def here(cls) -> Writer:
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "localhost"
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        except OSError:
            boot = "0" * 8
        return cls(host, boot, os.getpid(), secrets.token_hex(4))

    def stem(self, number: int) -> str:
        """Return the stem of this writer's segment `number`, made now."""
        now = time.time_ns() // 1000
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 1_000_000))
        moment = f"{moment}.{now % 1_000_000:06d}Z"
        return SegmentName(moment, self.host, self.boot, self.pid, self.token, number).stem


class Sealed(NamedTuple):
    """What sealing left: the file (None where there was no line), its lines and bytes, bytes cut off."""

    path: Path | None
    lines: int
    bytes: int
    torn_bytes: int


class Segment:
    """A segment this process writes. `write(line)` raises ValueError when it is full or retired."""

    def __init__(self, path: Path, fd: int, capacity: int) -> None:
        self.path = path
        self.fd = fd
        self._map = mmap.mmap(fd, capacity)
        self._end_at_least: int | None = None
        self.write: Callable[[bytes], int] = self._map.write

    @classmethod
    def create(cls, directory: Path, stem: str, capacity: int, *, sync: bool = False) -> Segment:
        """Create, lock, reserve and map a segment of `capacity` bytes.

        Space is reserved before it is mapped: writing to a hole of a full disk is SIGBUS, reserving it is
        an ordinary ENOSPC (posix_fallocate(3)). Raises OSError; then nothing is left behind.
        """
        path = directory / (stem + OPEN)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        try:
            with contextlib.suppress(OSError):  # some file systems have no modes
                os.fchmod(fd, MODE)  # whatever the umask: a loader of the group has to read it
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_file(path, fd):  # a loader took it for a dead writer's before it was locked
                raise OSError(errno.EAGAIN, "segment was taken away while it was made", str(path))
            if sync:
                sync_directory(directory)
            try:
                os.posix_fallocate(fd, 0, capacity)
                return cls(path, fd, capacity)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                os.ftruncate(fd, 0)
                return WrittenSegment(path, fd, capacity)
        except BaseException:
            if _is_file(path, fd):
                os.unlink(path)
            os.close(fd)
            raise

    def populate(self) -> None:
        """Fault the pages in ahead of need, where the kernel can (madvise(2), Linux 5.14).

        Called through ctypes because `mmap.madvise` would hold the GIL for the milliseconds it takes.
        """
        pages = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        try:
            ctypes.CDLL(None).madvise(
                ctypes.byref(pages), ctypes.c_size_t(len(self._map)), _MADV_POPULATE_WRITE
            )
        finally:
            del pages

    def end(self) -> int:
        """Return the bytes written so far."""
        return _end_of_lines(self.fd, os.fstat(self.fd).st_size)

    def lines(self) -> int:
        """Return the lines written so far."""
        return _count_lines(self.fd, self.end())

    def retire(self) -> None:
        """From now on `write` raises ValueError. Safe to repeat."""
        with contextlib.suppress(ValueError):  # it is closed already
            self._end_at_least = self._map.tell()  # another thread may write until it is
        self._map.close()

    def seal(self, *, sync: bool = False) -> Sealed:
        """Retire the segment and give it its sealed name; each step is safe to repeat after an OSError.

        Raises FileNotFoundError where its file is no longer in its directory.
        """
        self.retire()
        sealed = seal(self.path, self.fd, sync=sync, end_at_least=self._end_at_least)
        with contextlib.suppress(OSError):  # the descriptor is gone all the same (close(2))
            os.close(self.fd)
        return sealed

    def restore(self, directory: Path) -> None:
        """Write the lines of a retired segment, whose file was removed, to a new one of the same stem.

        Raises OSError; then it is as it was.
        """
        end = self.end()
        fresh = Segment.create(directory, self.path.stem, max(end, 1))
        for block in _blocks(self.fd, 0, end):
            fresh.write(block)
        fresh.retire()
        os.close(self.fd)
        self.path, self.fd = fresh.path, fresh.fd

    def abandon(self) -> None:
        """Let go of the map and the lock without touching the file: what a forked child does."""
        self.retire()
        os.close(self.fd)


class WrittenSegment(Segment):
    """A segment on a file system that can't map or reserve: each line is written where the last one ended.

    A write that was cut short is overwritten by the next one. `write` raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, fd: int, capacity: int) -> None:
        self.path = path
        self.fd = fd
        self._capacity = capacity
        self._end = 0
        self._end_at_least = None
        self._lock = ReentryLock()
        self.write = self._append

    def _append(self, line: bytes) -> int:
        with self._lock as interrupted:
            if interrupted or self._end + len(line) > self._capacity:
                raise ValueError("segment is full, retired, or in the middle of a write")
            if os.pwrite(self.fd, line, self._end) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._end += len(line)
            return len(line)

    def populate(self) -> None:
        """There is nothing to fault in."""

    def retire(self) -> None:
        self._capacity = 0

    def seal(self, *, sync: bool = False) -> Sealed:
        with self._lock as interrupted:
            if interrupted:
                raise OSError(errno.EAGAIN, "segment is in the middle of a write")
            os.ftruncate(self.fd, self._end)
            return super().seal(sync=sync)


def recover(path: Path, *, sync: bool = False) -> Sealed | None:
    """Seal the segment of a dead writer. Returns None where its writer lives or another took it.

    A lock that can be had says the writer is dead: the kernel frees it with the last descriptor (flock(2)).
    A segment that this process may read but not write, as one of another user in its group, is copied. Raises
    OSError, also for a file with a second name: cutting it would cut what lies there, wherever that is.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd, writable = os.open(path, os.O_RDWR | flags), True
    except PermissionError:
        fd, writable = os.open(path, os.O_RDONLY | flags), False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_file(path, fd):
            return None
        if os.fstat(fd).st_nlink != 1:
            raise OSError(errno.EMLINK, "has a second name (a hard link)", str(path))
        if os.path.lexists(path.with_suffix(SEALED)):
            raise OSError(errno.EEXIST, "its sealed name is taken until that file is loaded", str(path))
        return seal(path, fd, sync=sync) if writable else _seal_copy(path, fd)
    except BlockingIOError:
        return None
    finally:
        os.close(fd)


def seal(path: Path, fd: int, *, sync: bool = False, end_at_least: int | None = None) -> Sealed:
    """Cut the file to its last complete line and rename it; remove it where it has none.

    The caller holds the lock. A living writer knows how far it wrote at least (`end_at_least`) and has torn
    no line, so its end need not be looked for. Raises FileNotFoundError where `path` is no longer this file.
    """
    sealed = path.with_suffix(SEALED)
    renamed = not _is_file(path, fd) and _is_file(sealed, fd)  # by an earlier try that failed to sync
    if not renamed and not _is_file(path, fd):
        raise FileNotFoundError(errno.ENOENT, "segment is no longer in its directory", str(path))
    size = os.fstat(fd).st_size
    if end_at_least is not None and not os.pread(fd, 1, end_at_least).strip(b"\0"):
        end, torn = end_at_least, 0
    else:
        end, torn = _whole_and_torn(fd, size)
    if end == 0:
        os.unlink(path)
        return Sealed(None, 0, 0, torn)
    lines = _count_lines(fd, end)
    if not renamed:
        os.ftruncate(fd, end)
        if sync:
            os.fsync(fd)
        os.rename(path, sealed)
    if sync:
        sync_directory(path.parent)
    return Sealed(sealed, lines, end, torn)


def _seal_copy(path: Path, fd: int) -> Sealed:
    """Seal a file that can be read only: its lines go to one under the sealed name, then it goes.

    A crash in between leaves both; the sealed one is loaded first, then this one is found to be known.
    """
    end, torn = _whole_and_torn(fd, os.fstat(fd).st_size)
    passing, sealed = path.with_suffix(".part"), path.with_suffix(SEALED)
    if end:
        passing.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(passing, flags, MODE), "wb") as copy:
            copy.writelines(_blocks(fd, 0, end))
            copy.flush()
            os.fsync(copy.fileno())  # the original may have been on disk for long
        os.rename(passing, sealed)
        sync_directory(path.parent)
    os.unlink(path)
    return Sealed(sealed if end else None, _count_lines(fd, end), end, torn)


def segment_bytes(directory: Path) -> int:
    """Return what the segments of a spool take on disk; 0 where there is no spool. Raises OSError."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith((OPEN, SEALED)):
                with contextlib.suppress(FileNotFoundError):  # loaded meanwhile
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive power loss. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_file(path: Path, fd: int) -> bool:
    """Whether `path` names the very file that `fd` has open."""
    try:
        there, here = os.lstat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _end_of_lines(fd: int, size: int) -> int:
    """Return the offset after the last whole line.

    A copy that a kill cut short may have written its newline before its middle, so a last line with a NUL
    byte is no whole line. Lines before it were complete when it began.
    """
    end = _after_last_newline(fd, size)
    start = _after_last_newline(fd, end - 1)
    return start if any(0 in block for block in _blocks(fd, start, end)) else end


def _whole_and_torn(fd: int, size: int) -> tuple[int, int]:
    """Return the offset after the last whole line, and the bytes of an unfinished one after it."""
    end = _end_of_lines(fd, size)
    return end, sum(len(block) - block.count(0) for block in _blocks(fd, end, size))


def _count_lines(fd: int, end: int) -> int:
    return sum(block.count(b"\n") for block in _blocks(fd, 0, end))


def _after_last_newline(fd: int, end: int) -> int:
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _blocks(fd: int, start: int, end: int) -> Iterator[bytes]:
    return (os.pread(fd, min(_BLOCK, end - at), at) for at in range(start, end, _BLOCK))
