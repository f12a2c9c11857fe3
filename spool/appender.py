"""Where lines go: the current segment, its spare, rotation and age.

`write` is the bound `write` of the current segment's map, or `_no_segment` (an idle process has no file).
Both raise ValueError where a line can't go there, and then `append` finds room. The first line makes the
first segment; a spare that was not needed for a while is removed.

Fields are changed by whoever has the turn. A signal handler or a finalizer may append in the middle of a
rotation in its own thread; it finds the turn taken by itself, leaves the fields alone and writes a segment of
one line, as a writer of its own, so that no segment's number is given twice. Sealing holds `_sealing` alone,
so that no line waits for a sync; who needs both takes `_sealing` first.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from spool.drops import Warnings
from spool.reentry import ReentryLock
from spool.segment import DIRECTORY_MODE, Sealed, Segment, Writer, segment_bytes
from spool.settings import Settings

_SPARE_AGES: Final = 5
"""A spare that was not needed for this many `max_age` is removed."""
_BACKOFF_AGES: Final = 0.25
"""Part of `max_age` for which nobody asks the disk again after it refused a segment, at most a second."""
_MEASURE_SECONDS: Final = 10.0
"""How long a measurement of the spool's size is good for, plus what this process has added since."""


@dataclass
class Written:
    """What was written so far."""

    lines: int = 0
    bytes: int = 0
    segments: int = 0

    def add(self, lines: int, size: int) -> None:
        self.lines += lines
        self.bytes += size
        self.segments += 1


class Appender:
    """Writes lines to the segments of one process. Safe to use from any thread, handler or finalizer."""

    def __init__(self, settings: Settings, wake: Callable[[], None]) -> None:
        self.settings = settings
        self.write: Callable[[bytes], int] = _no_segment
        self._wake = wake
        self._lock = ReentryLock()
        self._sealing = threading.RLock()
        self._writer = Writer.here()
        self._number = 0
        self._current: Segment | None = None
        self._spare: Segment | None = None
        self._due = 0.0
        self._retired: list[Segment] = []
        self._sealed = Written()
        self._size = _SpoolSize(settings)
        self._refusal: tuple[int | None, str | None] = (None, None)
        self._refused_until = 0.0
        self._warnings = Warnings()

    # ---- finding room -------------------------------------------------------------------------------

    def append(self, line: bytes) -> None:
        """Write a line that the current segment had no room for. Raises OSError where there is none."""
        with self._lock as interrupted:
            if interrupted:
                self._append_alone(line)
            else:
                self._append_rotating(line)

    def _append_rotating(self, line: bytes) -> None:
        while True:
            try:
                self.write(line)
                return
            except ValueError:
                self._rotate(len(line))

    def _append_alone(self, line: bytes) -> None:
        segment = self._create(Writer.here().stem(1), len(line))
        segment.write(line)
        self._retired.append(segment)
        self._wake()

    def has_room(self) -> bool:
        """Whether a line would be kept: there is a current segment, or one can be made now."""
        with self._lock:
            try:
                if self._current is None:
                    self._rotate(0)
                return True
            except OSError:
                return False

    def refused_for(self) -> float:
        """Return the seconds after which it is worth to ask the disk again."""
        return max(0.01, self._refused_until - time.monotonic())

    def _rotate(self, need: int) -> None:
        """Make the spare, or a new segment of at least `need` bytes, the current one. Raises OSError."""
        self._retire_current()
        if self._spare is not None and need > self.settings.segment_bytes:
            self._give_back_spare()  # its number goes to the segment that fits
        segment, self._spare = self._spare, None
        if segment is None:
            segment = self._create_next(max(need, self.settings.segment_bytes))
        self._current, self._due = segment, time.monotonic() + self.settings.max_age
        self.write = segment.write
        self._wake()

    def _retire_current(self) -> None:
        segment, self._current, self.write = self._current, None, _no_segment
        if segment is not None:
            segment.retire()
            self._retired.append(segment)

    def _create_next(self, capacity: int) -> Segment:
        """Create this writer's next segment, or repeat why that was refused a moment ago. Raises OSError."""
        now = time.monotonic()
        if now < self._refused_until:
            raise OSError(*self._refusal)
        try:
            segment = self._create(self._writer.stem(self._number + 1), capacity)
        except OSError as error:
            self._refusal = (error.errno, error.strerror)
            self._refused_until = now + min(1.0, self.settings.max_age * _BACKOFF_AGES)
            raise
        self._number += 1
        return segment

    def _create(self, stem: str, capacity: int) -> Segment:
        self._size.reserve(capacity)
        directory, sync = self.settings.directory, self.settings.fsync
        try:
            return Segment.create(directory, stem, capacity, sync=sync)
        except FileNotFoundError:
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            return Segment.create(directory, stem, capacity, sync=sync)

    # ---- tidying ------------------------------------------------------------------------------------

    def tidy(self) -> float | None:
        """Do what is due: prepare a spare, retire by age, seal. Returns the seconds until more is."""
        with self._lock:
            if self._current is not None and time.monotonic() >= self._due:
                self._retire_current()
            if self._current is not None:
                self._prepare_spare()
            elif time.monotonic() >= self._due + self.settings.max_age * (_SPARE_AGES - 1):
                self._give_back_spare()
        self._seal_retired()
        return self._until_due()

    def _until_due(self) -> float | None:
        if self._current is not None:
            return max(0.0, self._due - time.monotonic())
        if self._retired:
            return self.settings.max_age
        return None if self._spare is None else self.settings.max_age * _SPARE_AGES

    def _prepare_spare(self) -> None:
        if self._spare is None:
            try:
                self._spare = self._create(self._writer.stem(self._number + 1), self.settings.segment_bytes)
            except OSError:
                return  # the line that needs it tries again, and is counted
            self._number += 1
            self._spare.populate()

    def _give_back_spare(self) -> None:
        """Remove the spare: it has no line, so sealing removes it, and its number is free again."""
        spare, self._spare = self._spare, None
        if spare is not None:
            self._number -= 1
            self._seal_one(spare)

    def _seal_retired(self) -> bool:
        """Seal what is full or aged, or try again later. Returns whether all is sealed."""
        with self._sealing:
            for segment in list(self._retired):
                if self._seal_one(segment):
                    self._retired.remove(segment)
            return not self._retired

    def _seal_one(self, segment: Segment) -> bool:
        try:
            sealed = self._seal_or_restore(segment)
        except OSError as error:
            self._warnings.log("can't seal %s: %s; trying again", segment.path, error)
            return False
        if sealed.path is not None:
            self._sealed.add(sealed.lines, sealed.bytes)
        return True

    def _seal_or_restore(self, segment: Segment) -> Sealed:
        """Seal; a file that was removed, or its whole directory, is still open here: write its lines anew."""
        try:
            return segment.seal(sync=self.settings.fsync)
        except FileNotFoundError:
            self.settings.directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            segment.restore(self.settings.directory)
            return segment.seal(sync=self.settings.fsync)

    # ---- for the emitter ----------------------------------------------------------------------------

    def seal(self) -> bool:
        """Make what was written so far loadable. Returns False (and logs) where that failed."""
        with self._lock as interrupted:
            if not interrupted:
                self._retire_current()
        return self._seal_retired()

    def close(self) -> None:
        """Leave nothing open. Safe to repeat."""
        with self._lock as interrupted:
            if not interrupted:
                self._retire_current()
                self._give_back_spare()
        self._seal_retired()

    def written(self) -> Written:
        """Return what was written so far, sealed or not."""
        with self._sealing, self._lock:
            written = Written(self._sealed.lines, self._sealed.bytes, self._sealed.segments)
            for segment in [*self._retired, *([self._current] if self._current else [])]:
                written.add(segment.lines(), segment.end())
        return written

    @contextmanager
    def diverted(self, write: Callable[[bytes], int]) -> Iterator[None]:
        """Have lines written elsewhere until the block ends."""
        with self._lock:
            self._retire_current()
            self.write = write
        try:
            yield
        finally:
            with self._lock:
                self._retire_current()

    def hold(self) -> None:
        """Wait until no other thread is changing or sealing, and keep it so until `release`."""
        self._sealing.acquire()
        self._lock.__enter__()

    def release(self) -> None:
        self._lock.__exit__(None, None, None)
        self._sealing.release()

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the parent's segments without touching their files."""
        for segment in filter(None, (self._current, self._spare, *self._retired)):
            segment.abandon()


class _SpoolSize:
    """Keeps the spool's segments below `max_spool_bytes`.

    Looking at every file each time would be slow just when many wait, so a measurement counts for a while.
    """

    def __init__(self, settings: Settings) -> None:
        self._directory: Path = settings.directory
        self._limit = settings.max_spool_bytes
        self._size = 0
        self._measured_at = -_MEASURE_SECONDS

    def reserve(self, capacity: int) -> None:
        """Count a segment that is about to be made. Raises OSError (EDQUOT) where it would be too much."""
        if not self._limit:
            return
        stale = time.monotonic() - self._measured_at >= _MEASURE_SECONDS
        if stale or self._size + capacity > self._limit:
            self._size, self._measured_at = segment_bytes(self._directory), time.monotonic()
        if self._size + capacity > self._limit:
            raise OSError(errno.EDQUOT, f"the spool has reached max_spool_bytes ({self._limit})")
        self._size += capacity


def _no_segment(line: bytes) -> int:
    raise ValueError("no segment is open")
