"""The running part: the current segment, its spare, rotation, age, fork.

An emit encodes one line and copies it into the current segment's map: no system call, no lock. Everything
else happens in `_append_slowly` (no segment yet, segment full) or in the housekeeping thread, which seals
full and aged segments and makes a spare ahead of need. The thread only prepares and tidies: where it is
missing (after fork, at exit, starved under gevent) an emit makes its own segment, and a segment that nobody
sealed is sealed by the loader once this process is gone.

States of `_write`: `_no_segment` (an idle process has no file), or the bound `write` of the current segment.
Both raise ValueError where the line can't go there, which leads to `_append_slowly`.

`_turn` guards the fields. A signal handler or a finalizer may emit in the middle of a rotation in its own
thread; that emit finds the turn taken by itself, leaves the fields alone and writes a segment of one line, as
a writer of its own, so that no segment's number is given twice.
Sealing holds `_sealing` alone, so that no emit waits for a sync.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Final
from uuid import UUID

from spool import context, ids, record
from spool.redaction import Redaction
from spool.segment import Segment, Writer
from spool.settings import Settings

log = logging.getLogger("spool")

LOG_INTERVAL: Final = 60.0
"""Seconds between two warnings about dropped lines."""
DROPPED_METRIC: Final = "spool_dropped_count"
"""Counter that tells, once lines flow again, how many were dropped, by cause."""
_IDLE_AGES: Final = 5
"""A spare that was not needed for this many `max_age` is removed."""
_RECOVERABLE: Final = frozenset({"disk"})
_MICROSECONDS: Final = tuple(f"{micro:03d}Z" for micro in range(1000))


@dataclass(frozen=True)
class Stats:
    """What an emitter did in this process: lines kept, lines dropped by cause, sealed bytes and segments."""

    emitted: int
    dropped: Mapping[str, int]
    bytes: int
    segments: int


class Emitter:
    """Appends events and metrics to a spool directory.

        emitter = Emitter("/var/spool/analytics", max_age=1.0)
        emitter.emit_event(event_type="memory_posted", user_id=user, family_unit_id=family)

    `emit_event` and the metric calls never raise (but ValueError with `strict`) and never wait. An emit after
    `close` is kept, too: its segment is sealed by the loader when the process has ended.

    Raises ValueError for a setting that can't be; see `Settings` for all of them.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        self.settings = Settings.of(directory=directory, **settings)
        self._redaction = Redaction()
        self._tick = (-1, "", "")
        self._start_afresh()
        _emitters.add(self)

    def _start_afresh(self) -> None:
        """The state of a process that has emitted nothing; also what a forked child begins with."""
        self._turn = _Turn()
        self._sealing = threading.RLock()
        self._write: Callable[[bytes], int] = _no_segment
        self._current: Segment | None = None
        self._spare: Segment | None = None
        self._retired: list[Segment] = []
        self._writer = Writer.here()
        self._number = 0
        self._due = 0.0
        self._thread: threading.Thread | None = None
        self._wake: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._dropped: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self._logged_at = -LOG_INTERVAL
        self._sealed_lines = self._sealed_bytes = self._sealed_segments = 0

    # ---- the hot path -------------------------------------------------------------------------------

    def emit_event(
        self, *, event_type: str, user_id: Any = None, family_unit_id: Any = None, session_id: Any = None,
        metadata: Mapping[str, Any] | None = None, event_id: Any = None, timestamp: Any = None,
    ) -> str | None:  # fmt: skip
        """Write one event and return its id, or None where it was dropped (see `stats`).

        `user_id`, `family_unit_id` and `session_id` are UUIDs or their text, else what is bound to the
        context. `event_id` is for callers with their own idempotency; `timestamp` is an aware datetime.
        """
        try:
            bound = context.current()
            if bound is not None:
                user_id = user_id or bound.user_id
                family_unit_id = family_unit_id or bound.family_unit_id
                session_id = session_id or bound.session_id
                metadata = _with_context(metadata, bound)
            if event_type not in record.known_names:
                record.check_name(event_type, "event_type")
            new_id, now = self._stamp()
            known = record.known_uuid
            line = record.encode_event(
                new_id if event_id is None else (new_id := record.uuid_text(event_id, "event_id")),
                event_type,
                now if timestamp is None else record.timestamp_text(timestamp),
                known(user_id.int if type(user_id) is UUID else user_id)
                or record.uuid_text(user_id, "user_id"),
                known(family_unit_id.int if type(family_unit_id) is UUID else family_unit_id)
                or record.uuid_text(family_unit_id, "family_unit_id"),
                None
                if session_id is None
                else known(session_id.int if type(session_id) is UUID else session_id)
                or record.uuid_text(session_id, "session_id"),
                record.encode_object(metadata, "metadata", self._redaction),
            )
        except Exception as error:
            self._refuse(error)
            return None
        try:
            self._write(line)
        except ValueError:
            return new_id if self._append_slowly(line) else None
        return new_id

    def record_metric(
        self, *, metric_name: str, metric_type: str, value: Any, labels: Mapping[str, Any] | None = None
    ) -> str | None:
        """Write one metric and return its id, or None where it was dropped.

        `metric_type` is counter (never below zero), gauge, timer (milliseconds) or histogram.
        """
        try:
            if metric_type not in record.METRIC_TYPES:
                raise record.Refused("invalid_type", f"metric_type is unknown: {str(metric_type)[:100]!r}")
            if metric_name not in record.known_names:
                record.check_name(metric_name, "metric_name")
            new_id, now = self._stamp()
            line = record.encode_metric(
                new_id, metric_name, metric_type, record.number_text(value, metric_type),
                record.encode_object(labels, "labels", self._redaction), now,
            )  # fmt: skip
        except Exception as error:
            self._refuse(error)
            return None
        try:
            self._write(line)
        except ValueError:
            return new_id if self._append_slowly(line) else None
        return new_id

    def increment_counter(
        self, *, metric_name: str, value: Any = 1, labels: Mapping[str, Any] | None = None
    ) -> str | None:
        """See `record_metric`; the value must not be below zero."""
        return self.record_metric(metric_name=metric_name, metric_type="counter", value=value, labels=labels)

    def record_gauge(
        self, *, metric_name: str, value: Any, labels: Mapping[str, Any] | None = None
    ) -> str | None:
        """See `record_metric`."""
        return self.record_metric(metric_name=metric_name, metric_type="gauge", value=value, labels=labels)

    def record_timer(
        self, *, metric_name: str, duration_ms: Any, labels: Mapping[str, Any] | None = None
    ) -> str | None:
        """See `record_metric`; the duration is in milliseconds."""
        return self.record_metric(
            metric_name=metric_name, metric_type="timer", value=duration_ms, labels=labels
        )

    def _stamp(self) -> tuple[str, str]:
        """A new id and the time as text. What a millisecond has in common is made once and kept as one tuple,
        so that threads never mix the halves of two."""
        nanoseconds = time.time_ns()
        millisecond = nanoseconds // 1_000_000
        tick, prefix, moment = self._tick
        if tick != millisecond:
            prefix = ids.prefix(millisecond)
            second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millisecond // 1000))
            moment = f"{second}.{millisecond % 1000:03d}"
            self._tick = (millisecond, prefix, moment)
        return f"{prefix}{next(ids.counter):012x}", moment + _MICROSECONDS[nanoseconds // 1000 % 1000]

    # ---- rotation -----------------------------------------------------------------------------------

    def _append_slowly(self, line: bytes) -> bool:
        """Find room for a line that the current segment had none for. Returns whether it was kept."""
        if len(line) > self.settings.max_line_bytes:
            message = f"line of {len(line)} bytes is longer than max_line_bytes"
            self._refuse(record.Refused("oversize", message))
            return False
        with self._turn as interrupted:
            try:
                if interrupted:
                    self._append_alone(line)
                else:
                    self._append_rotating(line)
                return True
            except OSError as error:
                self._drop("disk", f"can't write to {self.settings.directory}: {error}")
                return False

    def _append_rotating(self, line: bytes) -> None:
        while True:
            try:
                self._write(line)
                return
            except ValueError:
                self._rotate(len(line))

    def _append_alone(self, line: bytes) -> None:
        segment = self._create_as(Writer.here().stem(1), len(line))
        segment.write(line)
        self._retired.append(segment)
        self._wake.put(True)

    def _rotate(self, need: int) -> None:
        """Make the spare, or a new segment of at least `need` bytes, the current one. Raises OSError."""
        self._swap_out()
        if self._spare is not None and need > self.settings.segment_bytes:
            self._give_back_spare()  # its number goes to the segment that fits
        segment = self._spare or self._create(max(need, self.settings.segment_bytes))
        self._spare = None
        self._current, self._due = segment, time.monotonic() + self.settings.max_age
        self._write = segment.write
        self._start_housekeeping()
        self._wake.put(True)

    def _retire_current(self) -> None:
        with self._turn as interrupted:
            if not interrupted:
                self._swap_out()

    def _swap_out(self) -> None:
        segment, self._current, self._write = self._current, None, _no_segment
        if segment is not None:
            segment.retire()
            self._retired.append(segment)

    def _create(self, capacity: int) -> Segment:
        segment = self._create_as(self._writer.stem(self._number + 1), capacity)
        self._number += 1
        return segment

    def _create_as(self, stem: str, capacity: int) -> Segment:
        try:
            return Segment.create(self.settings.directory, stem, capacity, sync=self.settings.fsync)
        except FileNotFoundError:
            self.settings.directory.mkdir(mode=0o2770, parents=True, exist_ok=True)
            return Segment.create(self.settings.directory, stem, capacity, sync=self.settings.fsync)

    def _remove_spare(self) -> None:
        """Give the spare back; it has no line, so sealing removes it and its number is free again."""
        with self._turn as interrupted:
            if not interrupted:
                self._give_back_spare()

    def _give_back_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            self._number -= 1
            self._seal_one(spare)

    # ---- what was not kept --------------------------------------------------------------------------

    def _refuse(self, error: Exception) -> None:
        """Count a line that could not be made. Raises ValueError with `strict`."""
        cause = error.cause if isinstance(error, record.Refused) else "invalid"
        self._drop(cause, str(error))
        if self.settings.strict:
            raise ValueError(str(error)) from None

    def _drop(self, cause: str, message: str) -> None:
        with self._turn:
            self._dropped[cause] += 1
            if cause in _RECOVERABLE:
                self._untold[cause] += 1
            now = time.monotonic()
            if now - self._logged_at < LOG_INTERVAL:
                return
            self._logged_at = now
        log.warning("analytics line dropped (%s): %s; %d so far", cause, message, self._dropped.total())

    # ---- housekeeping -------------------------------------------------------------------------------

    def _start_housekeeping(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._keep_house, name="spool-housekeeping", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending, or has no thread left: emits do without
                self._thread = None

    def _keep_house(self) -> None:
        while self._wait():
            if self._current is not None and time.monotonic() >= self._due:
                self._retire_current()
            self._seal_retired()
            if self._current is None:
                self._remove_idle_spare()
            else:
                self._prepare_spare()
                self._tell_dropped()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the emitter was closed."""
        if self._current is not None:
            timeout: float | None = max(0.0, self._due - time.monotonic())
        elif self._retired:
            timeout = self.settings.max_age
        else:
            timeout = self.settings.max_age * _IDLE_AGES if self._spare is not None else None
        try:
            return self._wake.get(timeout=timeout)
        except queue.Empty:
            return True

    def _remove_idle_spare(self) -> None:
        if time.monotonic() >= self._due + self.settings.max_age * (_IDLE_AGES - 1):
            self._remove_spare()

    def _prepare_spare(self) -> None:
        with self._turn:
            if self._spare is not None or self._current is None:
                return
            try:
                spare = self._spare = self._create(self.settings.segment_bytes)
            except OSError:
                return  # the emit that needs it tries again, and counts
            spare.populate()

    def _tell_dropped(self) -> None:
        with self._turn:
            untold, self._untold = self._untold, Counter()
        for cause, count in untold.items():
            self.increment_counter(metric_name=DROPPED_METRIC, value=count, labels={"cause": cause})

    def _seal_retired(self) -> bool:
        """Seal what is full or aged, or try again later. Returns whether all is sealed."""
        with self._sealing:
            for segment in list(self._retired):
                if self._seal_one(segment):
                    self._retired.remove(segment)
            return not self._retired

    def _seal_one(self, segment: Segment) -> bool:
        try:
            sealed = segment.seal(sync=self.settings.fsync)
        except OSError as error:
            log.warning("can't seal %s: %s; trying again", segment.path, error)
            return False
        if sealed.path is not None:
            self._sealed_lines += sealed.lines
            self._sealed_bytes += sealed.bytes
            self._sealed_segments += 1
        return True

    # ---- for callers --------------------------------------------------------------------------------

    def seal(self) -> bool:
        """Make what was emitted so far loadable. Returns False (and logs) where that failed."""
        self._retire_current()
        return self._seal_retired()

    def stats(self) -> Stats:
        """Return the counts of this process since it began to emit."""
        with self._sealing, self._turn:
            live = [] if self._current is None else [self._current]
            return Stats(
                emitted=self._sealed_lines + sum(segment.lines() for segment in live),
                dropped=dict(self._dropped),
                bytes=self._sealed_bytes + sum(segment.end() for segment in live),
                segments=self._sealed_segments + len(live),
            )

    def close(self) -> None:
        """Seal everything and stop the housekeeping thread. Safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._wake.put(False)
            thread.join(timeout=5.0)
        self._retire_current()
        self._remove_spare()
        self._seal_retired()

    def _leave_to_parent(self) -> None:
        """In a forked child: let go of the parent's segments, then begin anew at the first emit."""
        for segment in filter(None, (self._current, self._spare, *self._retired)):
            segment.abandon()
        self._tick = (-1, "", "")
        self._start_afresh()


def _no_segment(line: bytes) -> int:
    raise ValueError("no segment is open")


def _with_context(metadata: Mapping[str, Any] | None, bound: context.Context) -> Mapping[str, Any] | None:
    """`metadata` with the role and the request id that are bound, unless it has its own."""
    extra = {"role": bound.role, "request_id": bound.request_id}
    return {**{key: value for key, value in extra.items() if value is not None}, **(metadata or {})}


class _Turn:
    """A lock that says, where its own thread holds it already, that it interrupts itself."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> bool:
        self._lock.acquire()
        self._depth += 1
        return self._depth > 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        self._lock.release()


_emitters: weakref.WeakSet[Emitter] = weakref.WeakSet()


def _before_fork() -> None:
    for emitter in _emitters:
        emitter._sealing.acquire()
        emitter._turn.__enter__()


def _after_fork_in_parent() -> None:
    for emitter in _emitters:
        emitter._turn.__exit__(None, None, None)
        emitter._sealing.release()


def _after_fork_in_child() -> None:
    for emitter in _emitters:
        emitter._leave_to_parent()


def _close_all() -> None:
    for emitter in list(_emitters):
        emitter.close()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
atexit.register(_close_all)


@cache
def get_emitter() -> Emitter:
    """Return the process-wide emitter, set up from the environment. Raises ValueError for a bad setting."""
    return Emitter()
