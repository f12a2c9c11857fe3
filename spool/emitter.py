"""The emitter: encodes each event or metric as one line and appends it to the spool.

The hot path is `emit_event` and `_metric`: no system call, no lock, nothing that releases the GIL. Both avoid
function calls, because each costs a twentieth of a whole emit (tests/bench/emit.py), and have a fast path for
the usual cases:

    step              fast path                                       otherwise
    context           nothing is bound, or the context is encoded     bound values fill the gaps
    time and id       the same millisecond as the last emit           `_new_tick`
    actor             the same objects as in the last emit            `record.encode_actor`, with a memo
    metadata, labels  flat, of exact types, keys seen before, no      `record.encode_object`
                      escape
    names             an exact `str` that was seen before             `record.encode_event_name`, ...
    bytes             fit into the current segment                    `Appender.append`

Every failure ends in `refuse` (the line cannot be encoded) or `_drop` (there is no room for it), which count
the line. Housekeeping (spare, age, sealing, reporting drops) runs in a thread; emits also work without it.
"""

from __future__ import annotations

import atexit
import errno
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from time import time_ns
from types import SimpleNamespace
from typing import Any, Final, Unpack, cast

from orjson import dumps

from spool import fork, identity, ids, kernel, record
from spool.account import Account, report_line
from spool.alterations import NO_SCOPE, Alterations
from spool.annotations import EventId, Id, Metadata, MetricType, Moment, Number
from spool.appender import Appender
from spool.context import in_force, scope_to_redact
from spool.defaults import Defaults
from spool.directory import DirectoryError, check_directory
from spool.drops import Drops
from spool.fork import NOTICED
from spool.housekeeper import Housekeeper
from spool.interruption import is_foreign
from spool.log import logger
from spool.record import EVENT_NAMES, METRIC_NAMES, PLAIN_NUMBER_LIMIT
from spool.redaction import Redaction
from spool.settings import BeforeEmit, Options, Settings
from spool.timer import Timer

_NO_TICK: Final = (0, "", b"")
_REHEARSALS: Final = 20
_NOBODY: Final = "00000000-0000-7000-8000-000000000000"
_BACKSLASH: Final = ord("\\")
_MICROSECONDS: Final = tuple(b"%03dZ" % micro for micro in range(1000))


@dataclass(frozen=True)
class Stats:
    """The counts of an emitter in this process: written lines, dropped lines by cause, bytes and segments.

    The lines include the metrics that report drops. `dropped_by_name` has the drops by cause and event type
    or metric name; invalid names, and all names but the first 100, count as `other`.
    """

    emitted: int
    dropped: Mapping[str, int]
    bytes: int
    segments: int
    dropped_by_name: Mapping[tuple[str, str], int] = field(default_factory=dict)
    converted: int = 0
    """Number of values without a JSON form that were written as the name of their type."""
    redacted: Mapping[str, int] = field(default_factory=dict)
    """Number of values replaced by `[redacted]`, by key."""
    unbound: int = 0
    """Number of calls of `spool.context.update` outside a scope, which bound nothing."""


class Emitter:
    """Appends events and metrics to a spool directory.

        emitter = Emitter("/var/spool/analytics", max_age=1.0)
        emitter.emit_event(event_type="memory_posted", user_id=user, family_unit_id=family)

    `emit_event` and the metric calls never raise (except ValueError with `strict`) and never wait. An emit
    after `close` is written, too: the loader seals its segment after the process has exited.

    Raises ValueError for an invalid setting; see `Settings` for all of them.
    """

    # With slots an emit is 8 % faster than with an instance dictionary, which an object gets at its first
    # `vars` or `copy`.
    __slots__ = (
        "__weakref__", "_account", "_actor", "_alterations", "_appender", "_before_emit", "_defaults",
        "_drops", "_encode_actor", "_harmless", "_harmless_beside_context", "_housekeeper", "_prepared",
        "_redaction", "_scope_in_force", "_tick", "_was_running", "settings",
    )  # fmt: skip

    def __init__(
        self, directory: str | os.PathLike[str] | None = None, *, before_emit: BeforeEmit | None = None,
        **settings: Unpack[Options],
    ) -> None:  # fmt: skip
        self.settings = Settings.of(directory=directory, **settings)
        self._redaction = Redaction(self.settings.redact)
        optional = self.settings.identity == "optional"
        self._encode_actor = identity.encode_optional_actor if optional else record.encode_actor
        self._harmless = self._redaction.harmless
        self._harmless_beside_context = self._redaction.harmless_beside_context
        self._scope_in_force = in_force if self._redaction.spares_context else scope_to_redact
        self._defaults = Defaults.of(self.settings, self._scope_in_force)
        if self._defaults is not None:
            self._scope_in_force = self._defaults.scope_in_force
        self._prepared = self._was_running = False
        self._before_emit: BeforeEmit | None = None
        self._start_afresh()
        self._check_start()
        _emitters.add(self)
        fork.add(self)
        if not self.settings.disabled:
            fork.warn_about_server()
        if before_emit is not None:
            self.before_emit = before_emit

    @property
    def before_emit(self) -> BeforeEmit | None:
        """A function that may change or drop each event; see spool/hook.py. It can be set at any time."""
        return self._before_emit

    @before_emit.setter
    def before_emit(self, hook: BeforeEmit | None) -> None:
        from spool.hook import install

        install(self, hook)

    def _start_afresh(self) -> None:
        """Set the state of a process that has emitted nothing, also in a forked child."""
        # Each of these two is a tuple that is replaced as a whole, so that no thread sees a partial update.
        self._tick: tuple[int, str, bytes] = _NO_TICK
        self._actor: tuple[object, object, object, bytes] = (object(), None, None, b"")
        self._drops = Drops()
        self._alterations = Alterations()
        self._housekeeper = Housekeeper(self._keep_house)
        self._appender = self._appender_class()(self.settings, self._housekeeper.wake)
        self._account = Account(self.settings.directory, self._appender.writer)

    def _check_start(self) -> None:
        if self.settings.disabled:
            from spool.disabled import disable

            disable(self)
        else:
            check_directory(self.settings)

    def _appender_class(self) -> type[Appender]:
        if self.settings.console:
            from spool.console import ConsoleAppender

            return ConsoleAppender
        return Appender

    def after_fork_in_child(self) -> None:
        """Start as a new process; see `fork.Forked`. The objects that the constructor made belong to the parent."""
        parents = self._appender
        drops = Drops()
        housekeeper = Housekeeper(self._keep_house, threaded=self._housekeeper.is_surely_asleep())
        appender = self._appender_class()(self.settings, housekeeper.wake, parents)
        account, parents_account = Account(self.settings.directory, appender.writer), self._account
        if NOTICED:
            return  # a signal handler that emitted in between has done this
        self._tick, self._drops, self._housekeeper, self._appender = _NO_TICK, drops, housekeeper, appender
        self._account = account
        self._alterations = Alterations()
        parents.leave_to_parent()
        parents_account.abandon()
        if self._prepared:
            self._appender.begin()
            self._housekeeper.wake()

    # ---- the hot path -------------------------------------------------------------------------------

    def emit_event(
        self, *, event_type: str, user_id: Id | None = None, family_unit_id: Id | None = None,
        session_id: Id | None = None, metadata: Metadata | None = None, event_id: EventId | None = None,
        timestamp: Moment | None = None,
    ) -> str | None:  # fmt: skip
        """Write one event and return its id, or None if it was dropped (see `stats`).

        `user_id`, `family_unit_id` and `session_id` are UUIDs or their text; by default they come from the
        context. `event_id` is for callers with their own idempotency; `timestamp` is an aware datetime.
        """
        try:
            if (scope := self._scope_in_force()) is None:
                encoded, harmless = None, self._harmless
            else:
                bound = scope.context
                encoded, harmless = bound.encoded, self._harmless_beside_context
                if (
                    encoded is None
                    or user_id is not None
                    or family_unit_id is not None
                    or session_id is not None
                ):
                    # Arguments win. Only None means "from the context": "" and 0 are invalid ids.
                    user_id = bound.user_id if user_id is None else user_id
                    family_unit_id = bound.family_unit_id if family_unit_id is None else family_unit_id
                    session_id = bound.session_id if session_id is None else session_id
                    metadata = bound.merged(metadata)
                    encoded, harmless = None, self._harmless
            if not NOTICED:
                fork.notice()
            start, prefix, moment = self._tick
            past = time_ns() - start
            if not 0 <= past < 1_000_000:
                prefix, moment, past = self._new_tick(start + past)
            micros = _MICROSECONDS[past // 1000]
            new_id = prefix + next(ids.tails)
            if event_id is not None:
                new_id = record.uuid_text(event_id, "event_id")
            if timestamp is not None:
                moment, micros = record.encode_timestamp(timestamp), b""
            data = None
            if type(metadata) is dict:
                for value in metadata.values():  # a loop over types is faster than any search in `data`
                    kind = type(value)
                    if kind is not str and kind is not int and kind is not bool and value is not None:
                        break
                else:
                    try:
                        data = dumps(metadata)
                        if _BACKSLASH in data or not (
                            harmless.issuperset(metadata) or self._redaction.spares(metadata, harmless)
                        ):
                            data = None
                    except TypeError as error:
                        if is_foreign(error):
                            raise
            elif metadata is None:
                data = b"{}"
            if data is None:
                if encoded is not None:  # a key of the context may also be a key of the event
                    user_id, family_unit_id, session_id = bound.actor()
                    encoded, metadata = None, bound.merged(metadata)
                data = record.encode_object(metadata, "metadata", self._redaction, self._alterations)
            if encoded is None:
                last_user, last_family, last_session, actor = self._actor
                if (
                    user_id is not last_user
                    or family_unit_id is not last_family
                    or session_id is not last_session
                ):
                    actor = self._encode_actor(user_id, family_unit_id, session_id)
                    self._actor = user_id, family_unit_id, session_id, actor
            elif metadata:
                actor, data = encoded, data[1:]
            else:
                actor, data = encoded.removesuffix(b","), b"}"
            try:
                if type(event_type) is not str:
                    raise KeyError
                name = EVENT_NAMES[event_type]
            except KeyError:
                name = record.encode_event_name(event_type)
            line = b"".join((b'{"event_id":"', new_id.encode(), name, moment, micros, actor, data, b"}\n"))
        except RecursionError:
            self._drops.too_deep += 1  # near the recursion limit a call may fail
            return None
        except Exception as error:
            self.refuse(error, event_type)
            return None
        try:
            try:
                self._appender.write(line)
            except (ValueError, OSError) as error:
                return new_id if self._append(line, error) else None
        except RecursionError:
            self._drops.too_deep += 1
            return None
        return new_id

    def _metric(
        self, metric_name: str, metric_type: MetricType, value: Number, labels: Metadata | None,
        timestamp: Moment | None,
    ) -> str | None:  # fmt: skip
        try:
            if not NOTICED:
                fork.notice()
            start, prefix, moment = self._tick
            past = time_ns() - start
            if not 0 <= past < 1_000_000:
                prefix, moment, past = self._new_tick(start + past)
            micros = _MICROSECONDS[past // 1000]
            new_id = prefix + next(ids.tails)
            if timestamp is not None:
                moment, micros = record.encode_timestamp(timestamp), b""
            if self._defaults is not None:
                labels = self._defaults.beside(labels)
            try:
                if type(metric_name) is not str or type(metric_type) is not str:
                    raise KeyError
                name = METRIC_NAMES[metric_type][metric_name]
            except KeyError:
                name = record.encode_metric_name(metric_type, metric_name)
            if (type(value) is int or type(value) is float) and 0 <= value < PLAIN_NUMBER_LIMIT:
                number = dumps(value)
            else:
                number = record.encode_number(value, metric_type)
            data = None
            if type(labels) is dict:
                for label in labels.values():
                    kind = type(label)
                    if kind is not str and kind is not int and kind is not bool and label is not None:
                        break
                else:
                    try:
                        data = dumps(labels)
                        if _BACKSLASH in data or not (
                            self._harmless.issuperset(labels)
                            or self._redaction.spares(labels, self._harmless)
                        ):
                            data = None
                    except TypeError as error:
                        if is_foreign(error):
                            raise
            elif labels is None:
                data = b"{}"
            if data is None:
                data = record.encode_object(labels, "labels", self._redaction, self._alterations)
            line = b"".join(
                (b'{"event_id":"', new_id.encode(), name, number, b',"labels":', data, b',"timestamp":"',
                 moment, micros, b'"}\n')
            )  # fmt: skip
        except RecursionError:
            self._drops.too_deep += 1  # near the recursion limit a call may fail
            return None
        except Exception as error:
            self.refuse(error, metric_name)
            return None
        try:
            try:
                self._appender.write(line)
            except (ValueError, OSError) as error:
                return new_id if self._append(line, error) else None
        except RecursionError:
            self._drops.too_deep += 1
            return None
        return new_id

    def record_metric(
        self, *, metric_name: str, metric_type: MetricType, value: Number, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> str | None:  # fmt: skip
        """Write one metric and return its id, or None if it was dropped.

        `metric_type` is counter (never below zero), gauge, timer (milliseconds) or histogram. `timestamp` is an
        aware datetime, for a value that was measured earlier.
        """
        try:
            return self._metric(metric_name, metric_type, value, labels, timestamp)
        except RecursionError:
            self._drops.too_deep += 1
            return None

    def increment_counter(
        self, *, metric_name: str, value: Number = 1, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> str | None:  # fmt: skip
        """See `record_metric`; the value must not be below zero."""
        try:
            return self._metric(metric_name, "counter", value, labels, timestamp)
        except RecursionError:
            self._drops.too_deep += 1
            return None

    def record_gauge(
        self, *, metric_name: str, value: Number, labels: Metadata | None = None, timestamp: Moment | None = None
    ) -> str | None:  # fmt: skip
        """See `record_metric`."""
        try:
            return self._metric(metric_name, "gauge", value, labels, timestamp)
        except RecursionError:
            self._drops.too_deep += 1
            return None

    def record_timer(
        self, *, metric_name: str, duration_ms: Number, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> str | None:  # fmt: skip
        """See `record_metric`; the duration is in milliseconds."""
        try:
            return self._metric(metric_name, "timer", duration_ms, labels, timestamp)
        except RecursionError:
            self._drops.too_deep += 1
            return None

    def timer(self, metric_name: str, labels: Metadata | None = None) -> Timer:
        """Return a context manager and decorator that records a timer; see `Timer`."""
        return Timer(self, metric_name, labels)

    # ---- the slow path ------------------------------------------------------------------------------

    def _new_tick(self, nanoseconds: int) -> tuple[str, bytes, int]:
        """Return the beginning of this millisecond's ids and timestamps, and the nanoseconds since it began."""
        if not fork.KERNEL_WIPES:
            fork.check_pid()
        if not self._housekeeper.threaded and not self._appender.is_interrupted():
            self._housekeeper.do_if_due()
        milliseconds, past = divmod(nanoseconds, 1_000_000)
        seconds, fraction = divmod(milliseconds, 1000)
        prefix, moment = ids.prefix(milliseconds), b"%b.%03d" % (_second(seconds), fraction)
        self._tick = nanoseconds - past, prefix, moment
        return prefix, moment, past

    def _append(self, line: bytes, error: Exception) -> bool:
        """Append a line for which the current segment had no room. Returns whether it was written."""
        if is_foreign(error):
            raise error
        try:
            if len(line) > self.settings.max_line_bytes:
                message = f"line of {len(line)} bytes is longer than max_line_bytes"
                raise record.Refused("oversize", message)
            self._appender.append(line)
            return True
        except Exception as failure:
            if isinstance(failure, OSError) and not is_foreign(failure):
                self._drop(failure, record.name_of(line))
            else:
                self.refuse(failure, record.name_of(line))
        return False

    def refuse(self, error: Exception, name: object = None) -> None:
        """Count the drop of an event or metric that could not be encoded. Raises ValueError with `strict`.

        Re-raises an exception that belongs to the application, such as one from its signal handlers.
        """
        refused = record.refusal(error)
        self._count_drop(refused.cause, name, str(refused))
        if self.settings.strict:
            raise refused from None

    def count_unbound(self) -> None:
        """Count a call of `spool.context.update` that bound nothing. Raises ValueError with `strict`.

        This is not a drop: no line was emitted, so no sum of lines includes it.
        """
        self._alterations.count_unbound()
        self._housekeeper.wake()
        if self.settings.strict:
            raise ValueError(NO_SCOPE)

    def _drop(self, error: OSError, name: object) -> None:
        """Count a line for which there was no room; housekeeping reports it once there is room."""
        cause = "spool_full" if error.errno == errno.EDQUOT else "disk"
        if not kernel.SUPPORTED:
            cause = "unsupported"
        self._count_drop(cause, name, f"could not write to {self.settings.directory}: {error}")

    def _count_drop(self, cause: str, name: object, message: str) -> None:
        """Count a drop. Housekeeping logs it, because a log handler may block."""
        if self._drops.add(cause, name, message, report=not self._appender.is_diverted()):
            self._housekeeper.wake()

    # ---- housekeeping -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create a segment and the housekeeping thread before the first emit, so that no request pays for them.

        Call it when a server or a worker starts; the middlewares do. Children forked later then prepare
        themselves. In uWSGI's master only the children are prepared; see `fork.will_fork_without_hooks`.
        Never raises.
        """
        self._prepared = True
        if fork.will_fork_without_hooks():
            return
        if not NOTICED:
            fork.notice()
        with suppress(Exception):
            self._appender.prepare()
            self._rehearse()
        self._housekeeper.wake()

    def _rehearse(self) -> None:
        """Run the code of an emit a few times without a spool, because its first run takes 0.2 ms."""
        rehearsal = copy(self)
        rehearsal._appender = cast(Appender, SimpleNamespace(write=len))
        rehearsal._before_emit = None
        for _ in range(_REHEARSALS):
            rehearsal.emit_event(
                event_type="rehearsal", user_id=_NOBODY, family_unit_id=_NOBODY, metadata={"n": 1}
            )
            rehearsal.increment_counter(metric_name="rehearsal", labels={"n": "1"})

    def _keep_house(self) -> float | None:
        """Do all work that is due. Returns the seconds until the next call, or None to wait for a wake-up."""
        waits = [self._appender.tidy()]
        self._drops.log()
        self._alterations.log()
        if self._drops.is_waiting():
            if not self._drops.seconds_until_report():
                self._report_dropped()
            waits.append(self._drops.seconds_until_report() if self._drops.is_waiting() else None)
        waits.append(self._drops.seconds_until_log())
        self._account.update(self._appender.sealed_so_far(), self._drops)
        return min((wait for wait in waits if wait is not None), default=None)

    def _report_dropped(self) -> None:
        """Report dropped lines as metrics, once there is room for these."""
        if not self._appender.has_room():
            self._appender.prepare()
        if not self._appender.has_room():
            self._drops.postpone()
            return
        for report in self._drops.unreported():
            self._account.announce(report)
            try:
                self._appender.append(report_line(self._account.writer, self._account.began, report))
            except OSError:
                self._drops.postpone()
                return
            self._drops.reported(report)
            self._account.reported(report)

    # ---- for callers --------------------------------------------------------------------------------

    def seal(self) -> bool:
        """Seal all lines emitted so far, so that they can be loaded. Returns False (and logs) if that failed."""
        return self._appender.seal()

    def stats(self) -> Stats:
        """Return the counts of this process since its first emit."""
        written = self._appender.written()
        by_name = {(kind.cause, kind.name): count for kind, count in self._drops.by_kind().items()}
        alterations = self._alterations
        return Stats(
            written.lines, self._drops.counts(), written.bytes, written.segments, by_name,
            alterations.converted(), alterations.redacted(), alterations.unbound(),
        )  # fmt: skip

    @contextmanager
    def diverted(self, write: Callable[[bytes], int], *, strict: bool) -> Iterator[None]:
        """Pass lines to `write` instead of the spool until the block ends. Used by `spool.testing`."""
        before, self.settings = self.settings, replace(self.settings, strict=strict)
        try:
            with self._appender.diverted(write):
                yield
        finally:
            self.settings = before

    def close(self) -> None:
        """Seal everything and stop the housekeeping thread. Safe to repeat."""
        if self._drops.is_waiting():
            self._report_dropped()
        self._housekeeper.stop()
        self._appender.close()
        self._drops.log()
        self._alterations.log()
        self._account.close(self._appender.sealed_so_far(), self._drops)

    def log_summary(self) -> None:
        """Log the total of dropped lines when the process exits."""
        self._drops.log_summary()

    # ---- forks: see spool/fork.py ---------------------------------------------------------------------

    def before_fork(self) -> None:
        """Wait until no other thread is in the middle of a change, and block changes until after the fork."""
        self._was_running = not self._appender.is_interrupted() and self._housekeeper.stop()
        self._appender.hold()

    def after_fork_in_parent(self) -> None:
        self._appender.release()
        if self._was_running:
            self._housekeeper.wake()


@lru_cache(maxsize=2)
def _second(seconds: int) -> bytes:
    """A time in seconds since 1970 as RFC 3339 text without fraction and offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()


_emitters: weakref.WeakSet[Emitter] = weakref.WeakSet()


def close_all() -> None:
    """Close every emitter of this process, without creating one."""
    for emitter in list(_emitters):
        emitter.close()


def close_at_end() -> None:
    """Close every emitter and log the total of dropped lines when a process exits.

    Registered with atexit; call it in a process that exits without atexit, such as by os._exit.
    """
    close_all()
    for emitter in list(_emitters):
        emitter.log_summary()


atexit.register(close_at_end)


@cache
def get_emitter() -> Emitter:
    """Return the process-wide emitter, set up from the environment.

    Never raises, because its first call may be inside a request. If a setting is invalid, it logs one warning
    and returns an emitter that drops everything with the cause `settings`. To fail at startup instead, create
    an `Emitter` there. In strict mode, raises ValueError if the spool cannot be created.
    """
    try:
        return Emitter()
    except DirectoryError:  # only in strict mode
        raise
    except ValueError as error:
        logger().warning("cannot emit analytics: %s; correct it and restart the process", error)
        return _MisconfiguredEmitter(str(error))


class _MisconfiguredEmitter(Emitter):
    """An emitter that drops and counts everything. It has no file and no thread, and never raises."""

    def __init__(self, problem: str) -> None:
        super().__init__(**vars(Settings()))
        self._problem = problem

    def _check_start(self) -> None:
        pass  # one warning is enough

    def prepare(self) -> None:
        """Do nothing: there is no segment to prepare."""

    def close(self) -> None:
        """Do nothing: there is no segment to seal."""

    def log_summary(self) -> None:
        """Do nothing: one warning has already reported that everything is dropped."""

    def emit_event(self, *, event_type: object = None, **_: Any) -> None:
        """Count a drop."""
        self._drops.add("settings", event_type, self._problem, report=False)

    def _metric(self, metric_name: object, *_: Any) -> None:
        self.emit_event(event_type=metric_name)

    def count_unbound(self) -> None:
        """Do nothing: nothing is emitted."""

    def refuse(self, error: Exception, name: object = None) -> None:
        """Count a drop."""
        self.emit_event(event_type=name)

    def stats(self) -> Stats:
        """Return the number of drops, under the cause `settings`."""
        by_name = {("settings", kind.name): count for kind, count in self._drops.by_kind().items()}
        dropped = sum(by_name.values())
        return Stats(0, {"settings": dropped} if dropped else {}, 0, 0, by_name)

    @contextmanager
    def diverted(self, write: Callable[[bytes], int], *, strict: bool) -> Iterator[None]:
        """Raise ValueError, so that a test that records reports the invalid setting."""
        raise ValueError(self._problem)
        yield
