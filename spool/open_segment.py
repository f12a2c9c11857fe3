"""A segment that this process writes: mapped if that is safe, otherwise one write per line.

Why appending to a map needs no lock: `mmap.write` copies the bytes and moves the position inside one C call
that keeps the GIL, so no thread, signal handler or finalizer can interrupt it (CPython,
Modules/mmapmodule.c). Moving the position to the end makes every later write raise ValueError, so a thread
that kept a reference to the `write` of an earlier segment notices and uses the next one.

The application shares the process's descriptors: if it daemonizes, it closes them all, and a number may then
refer to one of its own files. So a descriptor is used, and closed, only after a check that it still refers to
the segment. A map needs no descriptor, and keeps the file and its lock alive.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from spool import kernel
from spool.reentry import ReentryLock
from spool.segment import (
    FILE_MODE,
    OPEN,
    UNFINISHED,
    Sealed,
    count_lines,
    is_file,
    seal,
    whole_and_torn,
)

_UNSUPPORTED: Final = frozenset({errno.ENODEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Errors of file systems that cannot reserve or map (posix_fallocate(3), mmap(2))."""
_SLICE: Final = 1 << 16
"""Bytes of a map that are counted in one call, which holds the GIL for about 10 us."""


class Busy(ValueError):
    """Another thread is writing its line: take another segment instead of waiting."""


class Counts(NamedTuple):
    lines: int
    bytes: int


class HeldFile:
    """A file that this process holds open even if the application closes descriptors."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._identity = _identity(fd)

    def is_held(self) -> bool:
        try:
            return _identity(self._fd) == self._identity
        except OSError:
            return False

    def held(self) -> int:
        """Return the descriptor. Raises OSError (EBADF) if the application has closed it."""
        if not self.is_held():
            raise OSError(errno.EBADF, "the application has closed the segment's descriptor")
        return self._fd

    def reopened(self, path: Path) -> int:
        """Return the descriptor, reopened if needed. Raises FileNotFoundError if its path is another file."""
        if not self.is_held():
            fd = os.open(path, os.O_RDWR | kernel.EXISTING_FILE)
            if _identity(fd) != self._identity:
                os.close(fd)
                raise FileNotFoundError(errno.ENOENT, "segment is no longer in its directory", str(path))
            self._fd = fd
        return self._fd

    def close(self) -> None:
        if self.is_held():
            with contextlib.suppress(OSError):  # the descriptor is gone all the same (close(2))
                os.close(self._fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Segment:
    """Accepts lines between `create` and `retire`; `write` raises ValueError if a line does not fit.

    `busy` is held while the segment is created, resized or sealed, or while an unmapped line is written.
    """

    def __init__(self, directory: Path, stem: str) -> None:
        # Not `/`: pathlib would replace a TypeError of an application's signal handler by its own.
        self.path = directory.joinpath(stem + UNFINISHED)
        self.write: Callable[[bytes], int] = _not_created
        self.busy = ReentryLock()
        self.due = 0.0
        """When to seal a segment that is outside the appender's numbering."""
        self._sealed: Sealed | None = None
        self._file: HeldFile | None = None
        self._lines: _Mapped | _Written | None = None

    def create(self, capacity: int, *, mapped: bool = True) -> None:
        """Create, lock and reserve the file. Loaders ignore its name until it is renamed, once it is locked.

        Raises OSError; call `discard` then.
        """
        kernel.check_platform()
        directory = self.path.parent
        self._file = HeldFile(os.open(self.path, kernel.NEW_FILE, FILE_MODE))
        fd = self._file.held()
        kernel.share(fd, directory, FILE_MODE)
        kernel.lock(fd)
        self._lines = self._made_lines(capacity, mapped=mapped and kernel.overwrites_in_place(fd))
        opened = self.path.with_suffix(OPEN)
        os.rename(self.path, opened)
        self.path = opened
        self.write = self._lines.write

    def _made_lines(self, capacity: int, *, mapped: bool) -> _Mapped | _Written:
        assert self._file is not None
        if mapped:
            try:
                return _Mapped(self._file.held(), capacity)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                os.ftruncate(self._file.held(), 0)
        return _Written(self._file, self.busy, capacity)

    @property
    def capacity(self) -> int:
        return 0 if self._lines is None else self._lines.capacity

    def is_held(self) -> bool:
        """Whether the descriptor still refers to the segment."""
        return self._file is not None and self._file.is_held()

    def is_mapped(self) -> bool:
        return isinstance(self._lines, _Mapped)

    def resize(self, capacity: int) -> None:
        """Change the capacity of a segment that has no line and that no other thread can write to.

        Raises OSError; the segment is then unchanged.
        """
        assert self._file is not None and self._lines is not None
        fd, before = self._file.held(), self._lines
        self._lines = self._made_lines(capacity, mapped=isinstance(before, _Mapped))
        self.write = self._lines.write
        before.close()
        if isinstance(self._lines, _Mapped) and capacity < before.capacity:
            os.ftruncate(fd, capacity)

    def populate(self) -> None:
        """Fault in the pages of a segment that no other thread can write to."""
        if isinstance(self._lines, _Mapped):
            self._lines.populate()

    def counts(self) -> Counts:
        """Return the lines and bytes written so far. Never raises, reads no file."""
        return Counts(0, 0) if self._lines is None else self._lines.counts()

    def end(self) -> int:
        """Return the bytes written so far."""
        return 0 if self._lines is None else self._lines.end()

    def retire(self) -> None:
        """Make `write` raise ValueError from now on. Safe to repeat."""
        if self._lines is not None:
            self._lines.retire()

    def seal(self, *, sync: bool = False) -> Sealed:
        """Retire the segment and give it its sealed name; safe to repeat after an OSError.

        Raises FileNotFoundError if its file is no longer in its directory.
        """
        if self._sealed is not None:
            return self._sealed
        if self._file is None or self._lines is None:
            self.discard()
            return Sealed(None, 0, 0, 0)
        self.retire()
        fd = self._file.reopened(self.path)
        self._lines.settle()
        lines, end = self._lines.counts()
        self._sealed = seal(self.path, fd, lines, end, 0, sync=sync)
        self.abandon()
        return self._sealed

    def restore(self, directory: Path) -> None:
        """Write the lines of a retired segment, whose file was removed, to a new file with the same stem.

        Raises OSError; the segment is then unchanged.
        """
        if self._lines is None:
            return
        fresh = Segment(directory, self.path.stem)
        try:
            fresh.create(max(self._lines.end(), 1), mapped=self.is_mapped())
            for block in self._lines.blocks():
                fresh.write(block)
            fresh.retire()
        except BaseException:
            fresh.discard()
            raise
        self.abandon()
        self.path, self._file, self._lines = fresh.path, fresh._file, fresh._lines

    def discard(self) -> None:
        """Remove the file of a segment that has no line, whatever its current name is."""
        with contextlib.suppress(OSError):
            for path in (self.path, self.path.with_suffix(OPEN)):
                if self._file is None:
                    path.unlink(missing_ok=True)
                elif is_file(path, self._file.reopened(path)):
                    path.unlink()
        self.abandon()

    def abandon(self) -> None:
        """Release the file and its lock without changing them, as a forked child does."""
        if self._lines is not None:
            self._lines.close()
        if self._file is not None:
            self._file.close()


class _Mapped:
    """The lines in a map of the file."""

    def __init__(self, fd: int, capacity: int) -> None:
        kernel.reserve(fd, capacity)
        self.capacity = capacity
        self._map: mmap.mmap = kernel.map_file(fd, capacity)
        self._end: int | None = None
        self._counted = Counts(0, 0)
        self.write: Callable[[bytes], int] = self._map.write

    def populate(self) -> None:
        kernel.populate(self._map)

    def end(self) -> int:
        try:
            return self._map.tell() if self._end is None else self._end
        except ValueError:  # closed
            return self._counted.bytes

    def retire(self) -> None:
        with contextlib.suppress(ValueError):  # closed
            if self._end is None:
                written_at_least = self._map.tell()  # another thread may write until the next line
                self._map.seek(0, os.SEEK_END)
                self._end = self._end_after(written_at_least)

    def _end_after(self, written: int) -> int:
        """Return where the lines end: no line contains a NUL byte, and only NUL bytes follow the lines."""
        if written == self.capacity:  # full, or an exception occurred between the two calls in `retire`
            return self._map.rfind(b"\n", 0) + 1
        found = self._map.find(b"\0", written)
        return self.capacity if found < 0 else found

    def counts(self) -> Counts:
        """Count the lines written since the last call. Concurrent calls return the same correct result."""
        with contextlib.suppress(ValueError):  # closed: all of it is counted
            end, (lines, start) = self.end(), self._counted
            for at in range(start, end, _SLICE):
                lines += self._map[at : min(at + _SLICE, end)].count(b"\n")
            self._counted = Counts(lines, end)
        return self._counted

    def settle(self) -> None:
        """Do nothing: the counts are always known."""

    def blocks(self) -> Iterator[bytes]:
        end = self.end()
        return (self._map[at : min(at + _SLICE, end)] for at in range(0, end, _SLICE))

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # forked while another thread was taking its address
            self._map.close()


class _Written:
    """The lines of a file that cannot be mapped safely. Each line is one pwrite(2) after the previous line.

    A partial write is overwritten by the next one. If a signal handler raised during a write, the contents of
    the file are unknown: it then accepts no more lines, and `settle` searches for its end.
    """

    def __init__(self, file: HeldFile, busy: ReentryLock, capacity: int) -> None:
        self.capacity = capacity
        self._file = file
        self._busy = busy
        self._counted = Counts(0, 0)
        self._retired = False
        self._uncertain = False

    def write(self, line: bytes) -> int:
        """Write a line. Raises ValueError if there is no room, Busy, and OSError from the disk."""
        if not self._busy.try_run(lambda: self._write(line)):
            raise Busy("another thread is writing its line")
        return len(line)

    def _write(self, line: bytes) -> None:
        lines, end = self._counted
        if self._retired or self._uncertain or end + len(line) > self.capacity or not self._file.is_held():
            raise ValueError("segment is full or retired")
        self._uncertain = True
        written = 0
        try:
            written = kernel.write_at(self._file.held(), line, end)
        except OSError as error:
            self._uncertain = error.errno is None  # if None, a signal handler raised it
            raise
        if written == len(line):
            self._counted = Counts(lines + 1, end + len(line))
        self._uncertain = False
        if written != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def end(self) -> int:
        return self._counted.bytes

    def retire(self) -> None:
        self._retired = True

    def counts(self) -> Counts:
        return self._counted

    def settle(self) -> None:
        """Find the end of the lines if it is unknown. Raises OSError."""
        if self._uncertain:
            end, _ = whole_and_torn(self._file.held())
            self._counted = Counts(count_lines(self._file.held(), end), end)
            self._uncertain = False

    def blocks(self) -> Iterator[bytes]:
        return kernel.blocks(self._file.held(), 0, self.end())

    def close(self) -> None:
        self._retired = True


def _not_created(line: bytes) -> int:
    raise ValueError("no segment is open")
