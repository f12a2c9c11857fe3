"""`before_emit`: an application's function that sees each event before it is encoded, and may change or drop it.

    def without_bots(event):
        if event["metadata"].get("agent") == "bot":
            return None                       # dropped, counted as `before_emit`
        event["metadata"].pop("note", None)
        return event

    get_emitter().before_emit = without_bots  # or Emitter(before_emit=without_bots)

The event is a new dictionary of the arguments of `Emitter.emit_event`; its metadata includes the bound
context and the process-wide defaults. The returned event is redacted and written. `event_id` and `timestamp`
are None unless the caller gave them. An exception in the function drops the event (cause
`before_emit_failed`), and so does returning an event that cannot be written (with the cause of that). Metrics
do not pass through the function.

An emitter without a hook pays nothing for this feature: setting a hook changes the emitter's class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from spool import context
from spool.annotations import EventId, Id, Metadata, Moment
from spool.context import Complete, Context
from spool.emitter import Emitter
from spool.interruption import is_foreign
from spool.record import Refused
from spool.settings import BeforeEmit, Event
from spool.suggest import did_you_mean

_in_hook: ContextVar[bool] = ContextVar("analytics_before_emit", default=False)
"""Whether the hook is running: events emitted by the hook itself do not pass through it."""

_KEYS = (
    "event_type", "user_id", "family_unit_id", "session_id", "metadata", "event_id", "timestamp",
)  # fmt: skip


class HookedEmitter(Emitter):
    """An emitter with a hook."""

    __slots__ = ()

    def emit_event(
        self, *, event_type: str, user_id: Id | None = None, family_unit_id: Id | None = None,
        session_id: Id | None = None, metadata: Metadata | None = None, event_id: EventId | None = None,
        timestamp: Moment | None = None,
    ) -> str | None:  # fmt: skip
        """See `Emitter.emit_event`."""
        try:
            given = (event_type, user_id, family_unit_id, session_id, metadata, event_id, timestamp)
            event: Event = dict(zip(_KEYS, given, strict=True))
            if self._before_emit is None or _in_hook.get():
                return Emitter.emit_event(self, **event)
            return self._emit_changed(self._before_emit, event)
        except RecursionError:
            self._drops.too_deep += 1
            return None

    def _emit_changed(self, hook: BeforeEmit, event: Event) -> str | None:
        try:
            scope = self._scope_in_force()
            bound = Context() if scope is None else scope.context
            changed = self._call(hook, _with_context(event, bound))
        except Exception as error:
            self.refuse(error, event["event_type"])
            return None
        if changed is None:
            self._count_drop("before_emit", event["event_type"], "the before_emit hook dropped the event")
            return None
        with _complete():  # the hook may have removed bound values
            return Emitter.emit_event(self, **changed)

    def _call(self, hook: BeforeEmit, event: Event) -> Event | None:
        """Return the event that the hook returns. Raises `Refused`."""
        token = _in_hook.set(True)
        try:
            changed = hook(event)
        except Exception as error:
            if is_foreign(error):
                raise
            problem = f"before_emit failed: {type(error).__name__}: {error}"
            raise Refused("before_emit_failed", problem) from error
        finally:
            _in_hook.reset(token)
        return None if changed is None else _checked(changed)


def install(emitter: Emitter, hook: BeforeEmit | None) -> None:
    """Set or remove the hook of an emitter. Raises TypeError if the hook is not callable."""
    if hook is not None and not callable(hook):
        raise TypeError(f"before_emit must be a function of an event, not {type(hook).__name__}")
    emitter._before_emit = hook
    if type(emitter) is Emitter and hook is not None:
        emitter.__class__ = HookedEmitter


def _with_context(event: Event, bound: Context) -> Event:
    for name in ("user_id", "family_unit_id", "session_id"):
        if event[name] is None:
            event[name] = getattr(bound, name)
    merged = bound.merged(event["metadata"])
    event["metadata"] = dict(merged) if isinstance(merged, dict) else merged
    return event


def _checked(event: Any) -> Event:
    if not isinstance(event, dict):
        problem = f"before_emit must return the event or None, not {type(event).__name__}"
        raise Refused("before_emit_failed", problem)
    for key in event:
        if key not in _KEYS:
            problem = f'before_emit returned an event with the key "{key}"{did_you_mean(key, _KEYS)}'
            raise Refused("before_emit_failed", problem)
    if "event_type" not in event:
        raise Refused("before_emit_failed", 'before_emit returned an event without "event_type"')
    return event


@contextmanager
def _complete() -> Iterator[None]:
    token = context._scope.set(Complete(Context()))
    try:
        yield
    finally:
        context._scope.reset(token)
