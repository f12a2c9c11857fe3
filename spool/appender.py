"""Writes lines to segments: the current one and its spare, with rotation by size and age.

`write` writes a line to the current segment, or raises ValueError; then `append` finds room. From the first
emit, or `prepare`, until the process exits a segment is always ready: an idle process holds an empty one of
64 KiB, so the first emit after a pause is as fast as any other. Segments grow to the full size if they fill
before their maximum age, and shrink otherwise.

    who       does                                                                       holds
    emit      writes into the map                                                        nothing
    emit      moves to the spare when the current one is full                            _lock, for some us
    emit      creates a segment if housekeeping has not made a spare in time             _creating
    tidy      prepares spares, moves on from an aged segment, seals                      each in its turn

`_lock` is never held during a system call. A signal handler or a finalizer may emit in the middle of any of
this in the same thread: it finds that its own thread holds the lock, and writes a segment of one line under a
writer token of its own, so that no number is used twice. A handler may also raise there. So the state is one
frozen value that is replaced by a single assignment, and a segment is recorded before its file is created.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from spool import kernel
from spool.limit import SpoolLimit
from spool.log import Warnings
from spool.open_segment import Busy, Counts, Segment
from spool.reentry import ReentryLock
from spool.segment import DIRECTORY_MODE, Writer, written_bytes
from spool.settings import Settings

FIRST_BYTES: Final = 1 << 16
"""Capacity of the segments of a process that emits little. A killed process leaves two of them."""
_GROWTH: Final = 8
"""Growth of the capacity if a segment was full before its maximum age."""
_GROWTH_SECONDS: Final = 0.05
"""Interval of checks whether the current segment is half full, so that the next one should be larger."""
_BACKOFF_AGES: Final = 0.25
"""After the disk refused a segment, creation is retried after this fraction of `max_age`, at most a second."""
_UNSUPPORTED: Final = 3600.0
"""The same if the platform cannot write segments at all."""
_ANY_TIME: Final = float("inf")
_NOT_PERMITTED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class SealedSoFar(NamedTuple):
    """The sealed segments before the first unsealed one, their lines, and the last segment that received a line."""

    segments: int
    lines: int
    begun: int


@dataclass(frozen=True)
class Written:
    """The lines, bytes and segments written so far."""

    lines: int = 0
    bytes: int = 0
    segments: int = 0

    def plus(self, counts: Counts) -> Written:
        if not counts.lines:
            return self
        return Written(self.lines + counts.lines, self.bytes + counts.bytes, self.segments + 1)


@dataclass(frozen=True)
class _State:
    """`number` is that of the newest segment; `retired` segments wait to be sealed.

    `withdrawn` is a segment without lines that the holder of `_creating` is resizing or removing.
    """

    current: Segment | None = None
    spare: Segment | None = None
    withdrawn: Segment | None = None
    retired: tuple[Segment, ...] = ()
    sealed: Written = Written()
    number: int = 0

    def moved_on(self) -> _State:
        """Return the state with the spare as the current segment."""
        retired = self.retired if self.current is None else (*self.retired, self.current)
        return replace(self, current=self.spare, spare=None, retired=retired)


class Appender:
    """Writes lines to the segments of one process. Safe to use from any thread, handler or finalizer."""

    def __init__(self, settings: Settings, wake: Callable[[], None], before: Appender | None = None) -> None:
        """`before` is the appender of the parent process, if this one was forked."""
        parents: SpoolLimit | None = None if before is None else before._limit
        self.settings = settings
        self._wake = wake
        self._writer = Writer.here()
        self.writer: Final = self._writer.name
        self._warnings, self._measure_warnings = Warnings(), Warnings()

        # Replaced by single assignments; read without a lock.
        self.write: Callable[[bytes], int] = _no_segment
        self._due: float | None = None
        self._begun = False
        self._alone: list[
            Segment
        ] = []  # with one line each, or of threads that found the current segment busy

        # Guarded by _lock, never held during a system call.
        self._lock = ReentryLock()
        self._state = _State()
        self._diverted: Callable[[bytes], int] | None = None

        # Guarded by _creating; its holder may take _lock.
        self._creating = ReentryLock()
        self._making: Segment | None = None
        self._capacity = min(FIRST_BYTES, settings.segment_bytes)
        self._limit: SpoolLimit = SpoolLimit(settings.max_spool_bytes, parents)
        self._refusal: tuple[int | None, str | None] = (None, None)
        self._refused_until = 0.0

        # Held while segments are sealed; its holder may take _lock.
        self._sealing = ReentryLock()
        self._sealed_beyond: dict[int, int] = {}
        """Lines of sealed segments, by number, that follow a segment that is not sealed yet."""
        self._sealed_first = (0, 0)
        """The number of sealed segments before the first unsealed one, and their lines."""
        if before is not None and before._diverted is not None:  # in a child forked by a test that records
            self._divert(before._diverted)

    # ---- finding room -------------------------------------------------------------------------------

    def append(self, line: bytes) -> None:
        """Write a line for which the current segment has no room. Raises OSError if there is no other."""
        if self._lock.held_here() or self._creating.held_here():
            self._append_alone(line)
            return
        self._begun = True
        try:
            if not self._lock.run(lambda: self._write_or_move_on(line)):
                self._creating.run(lambda: self._write_or_create(line))
        except Busy:
            self._append_beside(line)
        if self._due is None:
            self._due = time.monotonic() + self.settings.max_age
        self._wake()

    def _write_or_move_on(self, line: bytes) -> bool:
        """Write to the current segment or the spare one. Return False if both are full. Raises Busy, OSError."""
        while True:
            state = self._state
            try:
                if self._diverted is not None:
                    self._diverted(line)
                    return True
                if state.current is not None:
                    state.current.write(line)
                    self.write = state.current.write
                    return True
            except Busy:
                raise
            except ValueError:
                if state.current is not None and not state.current.end():
                    return False  # it is empty, and too small for this line
                self._grow()
            if state.spare is None or state.spare.capacity < len(line):
                return False
            self._state = state.moved_on()
            self._due = time.monotonic() + self.settings.max_age

    def _write_or_create(self, line: bytes) -> None:
        while not self._lock.run(lambda: self._write_or_move_on(line)):
            self._make_room(max(len(line), self._capacity))

    def _make_room(self, capacity: int) -> None:
        current = self._state.current
        if current is not None and not current.end() and not current.is_held():
            self._give_back_spare()
            self._give_back_current()
            self._make_spare(capacity)
        elif current is not None and not current.end():
            self._unless_refused(capacity, lambda: self._enlarge_current(current, capacity))
        else:
            self._make_spare(capacity)

    def _grow(self) -> None:
        current = self._state.current
        if current is not None:
            self._capacity = max(self._capacity, min(self.settings.segment_bytes, current.capacity * _GROWTH))

    def _append_alone(self, line: bytes) -> None:
        segment = self._segment_alone(seconds=0)
        segment.busy.run(lambda: self._create(segment, len(line)))
        segment.write(line)
        self._wake()

    def _segment_alone(self, seconds: float) -> Segment:
        """Return a new segment with its own writer token, which housekeeping seals after the given seconds."""
        segment = Segment(self.settings.directory, Writer.here().stem(1))
        segment.due = time.monotonic() + seconds
        self._alone.append(segment)
        return segment

    def _append_beside(self, line: bytes) -> None:
        """Write to a segment that no other thread is writing to, of those that are not mapped."""
        for segment in list(self._alone):
            try:
                segment.write(line)
                return
            except ValueError:
                continue
        capacity = max(len(line), self._capacity)
        while True:
            segment = self._segment_alone(self.settings.max_age)
            segment.busy.run(lambda: self._create(segment, capacity))  # noqa: B023, it runs immediately
            try:
                segment.write(line)
                return
            except ValueError:  # another thread was faster
                continue

    # ---- making segments: under _creating -------------------------------------------------------------

    def _make_spare(self, capacity: int) -> None:
        """Create the spare, or change its capacity. Raises OSError."""
        if self._state.withdrawn is not None:
            self._change(_put_back)  # a signal handler raised in between
        spare = self._state.spare
        if spare is None:
            self._unless_refused(capacity, lambda: self._create_spare(capacity))
        elif spare.capacity != capacity:
            more = capacity - spare.capacity
            self._unless_refused(max(0, more), lambda: self._resize_spare(spare, capacity))

    def _unless_refused(self, bytes_more: int, work: Callable[[], None]) -> None:
        """Do work that uses disk space. Raises OSError; for a short time after that, raises without trying."""
        if time.monotonic() < self._refused_until:
            raise OSError(*self._refusal)
        try:
            self._limit.reserve(bytes_more)
            work()
        except OSError as error:
            self._refusal = (error.errno, error.strerror)
            seconds = min(1.0, self.settings.max_age * _BACKOFF_AGES) if kernel.SUPPORTED else _UNSUPPORTED
            self._refused_until = time.monotonic() + seconds
            raise

    def _create_spare(self, capacity: int) -> None:
        number = self._state.number + 1
        segment = self._making = Segment(self.settings.directory, self._writer.stem(number))
        try:
            self._create(segment, capacity)
            segment.populate()
            self._change(lambda state: replace(state, spare=segment, number=number))
        except BaseException:
            if self._state.number != number:
                segment.discard()
            raise

    def _resize_spare(self, spare: Segment, capacity: int) -> None:
        if not spare.is_held():
            self._give_back_spare()
            self._create_spare(capacity)
        elif self._lock.run(lambda: self._withdraw_spare(spare)):
            self._resize_withdrawn(spare, capacity)

    def _enlarge_current(self, current: Segment, capacity: int) -> None:
        """Make room for a long line in the current segment if it is empty, so that no number is skipped."""
        if self._lock.run(lambda: self._withdraw_current(current)):
            self._resize_withdrawn(current, capacity)

    def _resize_withdrawn(self, segment: Segment, capacity: int) -> None:
        try:
            segment.resize(capacity)
            segment.populate()
            self._change(_put_back)
        except BaseException:
            self._change(_put_back)
            raise

    def _withdraw_spare(self, spare: Segment) -> bool:
        """Under _lock. False if the spare has become the current segment in the meantime."""
        if self._state.spare is not spare:
            return False
        self._state = replace(self._state, spare=None, withdrawn=spare)
        return True

    def _withdraw_current(self, current: Segment) -> bool:
        """With _lock held: stop writes to the current segment if it has no lines; else return False."""
        if self._state.current is not current:
            return False
        self.write = _no_segment
        current.retire()
        if current.end():
            return False
        self._state = replace(self._state, current=None, withdrawn=current)
        return True

    def _give_back_spare(self) -> None:
        """Remove the spare: it has no line, so its number is free again."""
        spare = self._state.spare
        if spare is not None and self._lock.run(lambda: self._withdraw_spare(spare)):
            spare.discard()
            self._change(_give_back)

    def _give_back_current(self) -> None:
        """Remove the current segment if it has no line and its number is the last."""
        current = self._state.current
        if current is None or self._state.spare is not None:
            return
        if self._lock.run(lambda: self._withdraw_current(current)):
            current.discard()
            self._change(_give_back)

    def _create(self, segment: Segment, capacity: int) -> None:
        directory, mapped = self.settings.directory, self.settings.mapped
        try:
            segment.create(capacity, mapped=mapped)
        except FileNotFoundError:
            segment.discard()
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            segment.create(capacity, mapped=mapped)

    def _change(self, change: Callable[[_State], _State]) -> None:
        """Replace the state by one derived from it."""

        def work() -> None:
            self._state = change(self._state)

        self._lock.run(work)

    # ---- tidying: the housekeeping thread -------------------------------------------------------------

    def prepare(self) -> None:
        """Create a segment before the first emit. Logs if that is not possible yet."""
        self._begun = True
        if not self._lock.held_here():
            self._creating.try_run(self._prepare_current)

    def begin(self) -> None:
        """Have the housekeeping thread prepare a segment."""
        self._begun = True

    def tidy(self) -> float | None:
        """Prepare, replace an aged segment and seal, if due. Returns the seconds until more work is due."""
        if self._begun:
            self._creating.run(self._prepare)
        self._seal_retired()
        self._measure()
        return self._until_due()

    def has_room(self) -> bool:
        """Whether a short line can be written immediately."""
        if self.is_diverted():
            return False
        state = self._state
        current = state.current
        return state.spare is not None or (current is not None and current.end() < current.capacity - 1024)

    def refused_for(self) -> float:
        """Return the seconds after which the disk should be tried again."""
        return max(0.01, self._refused_until - time.monotonic())

    def _prepare(self) -> None:
        due = self._due is not None and time.monotonic() >= self._due
        current = self._state.current
        if due and current is not None and current.end():
            self._replace_aged(current)
        elif self._due is not None and current is not None:
            if due:
                self._due = None  # the line for which it was set was never written
            if current.end() > current.capacity // 2:
                self._grow()
            self._try_to_make_spare()
        else:
            self._due = None
            self._prepare_current()

    def _replace_aged(self, aged: Segment) -> None:
        """Switch to the next segment so that at every instant one segment accepts lines."""
        self._shrink(aged)
        self._try_to_make_spare()
        self._due = None
        self._lock.run(self._move_on)

    def _shrink(self, aged: Segment) -> None:
        if aged.end() < aged.capacity // _GROWTH:
            first = min(FIRST_BYTES, self.settings.segment_bytes)
            self._capacity = max(first, min(self._capacity, aged.end() * 4 // 4096 * 4096))

    def _prepare_current(self) -> None:
        if self._state.current is None:
            self._try_to_make_spare()
            self._lock.run(self._move_on)

    def _move_on(self) -> None:
        """Under _lock: retire the current segment for the spare, or for none."""
        self._state = self._state.moved_on()
        self.write = self._diverted or self._write_first(self._state.current)

    def _write_first(self, segment: Segment | None) -> Callable[[bytes], int]:
        """Return the function that writes a segment's first line and starts its age."""
        if segment is None:
            return _no_segment
        write = segment.write

        def write_first(line: bytes) -> int:
            if self._due is None:
                self._due = time.monotonic() + self.settings.max_age
            self._wake()  # before the line: if a signal handler raises in between, it is harmless
            written = write(line)
            self.write = write
            return written

        return write_first

    def _try_to_make_spare(self) -> None:
        try:
            self._make_spare(self._capacity)
        except OSError:
            return  # the line that needs it is counted; `_keep_house` retries

    def _measure(self) -> None:
        """Measure the spool between two creations: reserved segments without a file yet would be missed."""
        if not self._limit.is_due(self._capacity):
            return
        begun = self._creating.run(self._limit.begin)
        try:
            measured = written_bytes(self.settings.directory, self._writer.token)
        except OSError as error:
            self._measure_warnings.log("could not measure %s: %s", self.settings.directory, error)
            return
        self._creating.run(lambda: self._limit.finish(begun, measured))

    def _until_due(self) -> float | None:
        if self._state.retired or self._alone:
            return min(_GROWTH_SECONDS, self.settings.max_age)
        if self._due is None:
            return None if self._state.current is not None or not self._begun else self.refused_for()
        wait = max(0.0, self._due - time.monotonic())
        return wait if self._capacity == self.settings.segment_bytes else min(wait, _GROWTH_SECONDS)

    # ---- sealing --------------------------------------------------------------------------------------

    def _seal_retired(self) -> bool:
        """Seal retired segments, or retry later. Returns whether all are sealed."""
        return self._seal_due(time.monotonic())

    def _seal_due(self, now: float) -> bool:
        if self._sealing.held_here() or self._lock.held_here():
            return False
        return self._sealing.run(lambda: self._seal_each(now))

    def _seal_each(self, now: float) -> bool:
        for segment in self._state.retired:
            if segment.busy.try_run(segment.retire) and self._seal_one(segment):
                self._change(lambda state, sealed=segment: _without(state, sealed))  # type: ignore[misc]
                self._note_sealed(segment)
        for segment in [each for each in self._alone if each.due <= now]:
            if segment.busy.try_run(segment.retire) and self._seal_one(segment):
                self._change(
                    lambda state, sealed=segment: replace(  # type: ignore[misc]
                        state, sealed=state.sealed.plus(sealed.counts())
                    )
                )
                self._alone.remove(segment)
        return not self._state.retired and not self._alone

    def _note_sealed(self, segment: Segment) -> None:
        self._sealed_beyond[_number(segment)] = segment.counts().lines
        segments, lines = self._sealed_first
        while (more := self._sealed_beyond.pop(segments + 1, None)) is not None:
            segments, lines = segments + 1, lines + more
        self._sealed_first = segments, lines

    def sealed_so_far(self) -> SealedSoFar:
        """Return the counts of this writer's segments. Segments of a single line belong to other writer tokens."""
        state = self._state
        segments, lines = self._sealed_first
        others = (*state.retired, *((state.current,) if state.current else ()))
        begun = max([segments, *(_number(each) for each in others if each.end())])
        return SealedSoFar(segments, lines, begun)

    def _seal_one(self, segment: Segment) -> bool:
        try:
            self._seal_or_restore(segment)
        except OSError as error:
            if error.errno in _NOT_PERMITTED:
                self._leave_to_loader(segment, error)
                return True
            self._warnings.log("could not seal %s: %s; retrying", segment.path, error)
            return False
        return True

    def _seal_or_restore(self, segment: Segment) -> None:
        """Seal; write the lines of a file that was removed, or its whole directory, to a new one."""
        try:
            segment.seal(sync=self.settings.fsync)
        except FileNotFoundError:
            self.settings.directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            segment.restore(self.settings.directory)
            segment.seal(sync=self.settings.fsync)

    def _leave_to_loader(self, segment: Segment, error: OSError) -> None:
        """Release the lock of a segment that this process may no longer rename, so that a loader seals it."""
        segment.abandon()
        self._warnings.log(
            "could not seal %s: %s; this process runs as user %d and has left it to the loader; "
            'give that user write permission for "%s", or drop privileges before the first emit',
            segment.path, error.strerror, os.geteuid() if hasattr(os, "geteuid") else -1,
            self.settings.directory,
        )  # fmt: skip

    # ---- for the emitter ----------------------------------------------------------------------------

    def seal(self) -> bool:
        """Seal all lines written so far, so that they can be loaded. Returns False (and logs) if that failed."""
        if not self._lock.held_here():
            self._lock.run(self._retire_current)
        sealed = self._seal_due(_ANY_TIME)
        if self._begun:
            self._wake()
        return sealed

    def _retire_current(self) -> None:
        current = self._state.current
        if current is not None and current.end():
            self._due = None
            self._move_on()

    def close(self) -> None:
        """Seal all segments and leave none open. Safe to repeat."""
        self._begun = False
        if not (self._lock.held_here() or self._creating.held_here()):
            self._creating.run(self._retire_all)
        self._seal_due(_ANY_TIME)

    def _retire_all(self) -> None:
        self._due = None
        self._give_back_spare()
        self._give_back_current()
        self._lock.run(self._move_on)

    def written(self) -> Written:
        """Return the counts of all written lines, sealed or not. Takes no lock, reads no file, never raises."""
        state = self._state
        written = state.sealed
        for segment in (*state.retired, *list(self._alone), *((state.current,) if state.current else ())):
            written = written.plus(segment.counts())
        return written

    @contextmanager
    def diverted(self, write: Callable[[bytes], int]) -> Iterator[None]:
        """Pass lines to another function until the block ends, then restore the previous one."""
        before = self._diverted
        self._lock.run(lambda: self._divert(write))
        try:
            yield
        finally:
            self._lock.run(lambda: self._divert(before))

    def is_diverted(self) -> bool:
        """Whether lines are diverted, as in a test that records."""
        return self._diverted is not None

    def _divert(self, write: Callable[[bytes], int] | None) -> None:
        self._diverted = write
        self.write = write or self._write_first(self._state.current)

    def hold(self) -> None:
        """Wait until no other thread changes, creates or seals segments, and block such work until `release`."""
        for lock in (self._sealing, self._creating, self._lock):
            lock.hold()

    def release(self) -> None:
        for lock in (self._lock, self._creating, self._sealing):
            lock.let_go()

    def is_interrupted(self) -> bool:
        """Whether this thread is in the middle of a change."""
        return any(lock.held_here() for lock in (self._sealing, self._creating, self._lock))

    def leave_to_parent(self) -> None:
        """In a forked child: release the parent's segments without changing their files."""
        state = self._state
        for segment in (
            state.current,
            state.spare,
            state.withdrawn,
            self._making,
            *state.retired,
            *self._alone,
        ):
            if segment is not None:
                segment.abandon()


def _number(segment: Segment) -> int:
    return int(segment.path.stem.rpartition("-")[2])


def _without(state: _State, sealed: Segment) -> _State:
    retired = tuple(each for each in state.retired if each is not sealed)
    return replace(state, retired=retired, sealed=state.sealed.plus(sealed.counts()))


def _put_back(state: _State) -> _State:
    """Restore the withdrawn segment as the spare or the current segment; retire it if both exist."""
    withdrawn, state = state.withdrawn, replace(state, withdrawn=None)
    if withdrawn is None:
        return state
    if state.spare is None:
        return replace(state, spare=withdrawn)
    if state.current is None:
        return replace(state, current=withdrawn)
    return replace(state, retired=(*state.retired, withdrawn))


def _give_back(state: _State) -> _State:
    """Forget the withdrawn segment and free its number, the last one."""
    return replace(state, withdrawn=None, number=state.number - 1)


def _no_segment(line: bytes) -> int:
    raise ValueError("no segment is open")
