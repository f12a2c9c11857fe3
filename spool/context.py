"""The context of emitted events: the acting user and the current request.

    with bind(user_id=user.id, family_unit_id=user.family_unit_id, role="parent"):
        await analytics.emit_event(event_type="feed_viewed")

    update(user_id=user.id)      # for the rest of the request, such as in a dependency that knows the user

    with scope():                # for a job, a message or a thread: starts without a user
        run(job)

A scope is held in a context variable: asyncio tasks, threads of Starlette's pool and background tasks inherit
it. A scope is mutable, so an endpoint sees what a dependency bound, even if the dependency ran in a thread,
with a copy of the request's context. A task that was started within a scope gets a scope of its own when it
binds something, so sibling tasks of one request never see each other's values.

A block may end in a different copy of the context than it started in: FastAPI runs each half of a sync
dependency, and each piece of a sync streaming body, in its own copy. The context variable cannot be reset
then. Instead, every copy that still holds the scope shows the values bound outside it, so that no identity
outlives its block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypedDict, Unpack, cast
from uuid import UUID
from weakref import WeakSet, ref

import orjson

from spool.alterations import Alterations
from spool.annotations import Id
from spool.convert import Converter
from spool.interruption import is_foreign
from spool.record import Refused, encode_actor


class Values(TypedDict, total=False):
    """The values that can be bound."""

    user_id: Id | None
    family_unit_id: Id | None
    session_id: Id | None
    role: str | None
    request_id: str | None
    trace_id: str | None
    extra: Mapping[str, object] | None


_UNCHANGED: Final[Any] = object()
_TEXT: Final = frozenset({str, type(None)})
_CARRIED: Final = frozenset({str, int})
_SCALARS: Final = ("user_id", "family_unit_id", "session_id", "role", "request_id", "trace_id")


@dataclass(slots=True)
class Context:
    """The bound values; unbound ones are None. Never modified, only replaced.

    Not a frozen dataclass: creating one, which each request does, would take three times as long.
    """

    user_id: Any = None
    family_unit_id: Any = None
    session_id: Any = None
    role: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    extra: Mapping[str, object] | None = None
    """The application's own metadata keys."""
    defaults: Mapping[str, str] | None = None
    """Values that the emitter adds to every event; see spool/defaults.py."""
    beside_defaults: Scope | None = field(default=None, init=False, repr=False, compare=False)
    """This context with the defaults of the emitter that used it last."""
    encoded: bytes | None = field(default=None, init=False, repr=False, compare=False)
    """The part of a line that all events in this context share, if `encode` could build it."""

    def metadata(self) -> dict[str, object]:
        """Return the values that belong in the metadata of events."""
        values: dict[str, object] = {}
        if self.defaults is not None or self.extra is not None:
            values = {**(self.defaults or {}), **(self.extra or {})}
        if self.role is not None:
            values["role"] = self.role
        if self.request_id is not None:
            values["request_id"] = self.request_id
        if self.trace_id is not None:
            values["trace_id"] = self.trace_id
        return values

    def actor(self) -> tuple[Any, Any, Any]:
        """Return the ids of user, family and session."""
        return self.user_id, self.family_unit_id, self.session_id

    def merged(self, metadata: Any) -> Any:
        """Return an event's metadata merged with the bound values; the event's own keys win."""
        if type(metadata) is dict:
            values = self.metadata()
            values.update(metadata)
            return values
        return beside(self.metadata(), metadata)

    def encode(self) -> None:
        """Build the part of a line that all events in this context share.

        It starts as `record.encode_actor`, continues into the metadata and ends with `{` or `,`. Building it
        takes half as long as an emit, once per bound user, and makes each emit a fifth faster
        (tests/bench/emit.py). It is not built for values of other types, for invalid values, which the emit
        refuses, or for keys of the application, which the emitter may have to redact.
        """
        if self.extra or not {type(self.role), type(self.request_id), type(self.trace_id)} <= _TEXT:
            return
        try:
            actor = encode_actor(self.user_id, self.family_unit_id, self.session_id)
            extra = orjson.dumps(self.metadata())[:-1]
        except (Refused, TypeError) as error:  # TypeError for half of a surrogate pair
            if is_foreign(error):
                raise
            return
        if b"\\u0000" not in extra:
            self.encoded = actor + extra if len(extra) == 1 else b"%b%b," % (actor, extra)

    def replaced(
        self, *, user_id: Any = _UNCHANGED, family_unit_id: Any = _UNCHANGED, session_id: Any = _UNCHANGED,
        role: Any = _UNCHANGED, request_id: Any = _UNCHANGED, trace_id: Any = _UNCHANGED,
        extra: Any = _UNCHANGED,
    ) -> Context:  # fmt: skip
        """Return a copy with the given values replaced. Other values and other keys of `extra` are kept."""
        return Context(
            self.user_id if user_id is _UNCHANGED else user_id,
            self.family_unit_id if family_unit_id is _UNCHANGED else family_unit_id,
            self.session_id if session_id is _UNCHANGED else session_id,
            self.role if role is _UNCHANGED else role,
            self.request_id if request_id is _UNCHANGED else request_id,
            self.trace_id if trace_id is _UNCHANGED else trace_id,
            self.extra if extra is _UNCHANGED else _joined(self.extra, extra),
        )

    def with_defaults(self, values: Mapping[str, str]) -> Context:
        """Return a copy with an emitter's defaults, encoded if this context is encoded."""
        other = self.replaced()
        other.defaults = values
        if self.encoded is not None:
            other.encode()
        return other


def _joined(before: Mapping[str, object] | None, extra: Any) -> dict[str, object] | None:
    if extra is None:
        return None
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra must be a dictionary of keys for metadata, not {type(extra).__name__}")
    return {**(before or {}), **extra}


def beside(values: Mapping[str, object], metadata: Any) -> Any:
    """Return metadata or labels with additional values; their own keys win."""
    if metadata is None:
        return values
    if not issubclass(
        type(metadata), dict
    ):  # a model or dataclass, or a value that `record.encode_object` refuses
        converted = Converter(Alterations()).convert(metadata)
        if type(converted) is not dict:
            return metadata
        metadata = converted
    return dict.__or__(dict(values), metadata)


_NOBODY: Final = Context()


class Scope:
    """A unit of work, such as a request, with its currently bound values."""

    __slots__ = ("__weakref__", "context", "followers", "request", "task")

    def __init__(self, context: Context, task: ref[Any] | None = None) -> None:
        self.context = context
        self.task = task
        """The task that opened the scope and may replace its values; None if opened outside asyncio."""
        self.request: tuple[str, str] | None = None
        """Method and path of the scope's HTTP request, if an ASGI middleware serves it."""
        self.followers: WeakSet[Scope] | None = None
        """Inner scopes that ended in another copy of the context and therefore show this scope's values."""


class Complete(Scope):
    """The scope of a complete event, to which an emitter adds no defaults."""

    __slots__ = ()


def _task() -> ref[Any] | None:
    """Return a weak reference to the running asyncio task: its context holds the scope that holds this reference."""
    tasks = sys.modules.get("asyncio.tasks")
    if tasks is None:
        return None
    try:
        running = tasks.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
    return None if running is None else ref(running)


_scope: ContextVar[Scope | None] = ContextVar("analytics", default=None)
in_force = _scope.get
"""Return the current scope, or None."""


def scope_to_redact() -> Scope | None:
    """Return a copy of the current scope without its encoded part, for an emitter that redacts values in it."""
    inner = _scope.get()
    if inner is None:
        return None
    return type(inner)(inner.context.replaced())


def current() -> Context:
    """Return the bound values."""
    inner = _scope.get()
    return Context() if inner is None else inner.context


@contextmanager
def bind(**values: Unpack[Values]) -> Iterator[Context]:
    """Bind `user_id`, `family_unit_id`, `session_id`, `role`, `request_id` or `trace_id` until the block ends.

    `extra` has the application's own keys, such as plan or tenant, which are added to the metadata of events.
    Values and keys of `extra` that are not given keep their outer binding; `extra=None` removes all its keys.
    Raises TypeError for an unknown name, and for an `extra` that is not a mapping.

    The binding applies to this copy of the context. FastAPI runs an endpoint in a different copy than its
    sync dependencies, and each further piece of a sync streaming body in another: use `update` there.
    """
    begun = begin(**values)
    try:
        yield begun.scope.context
    finally:
        end(begun)


@contextmanager
def scope(**values: Unpack[Values]) -> Iterator[Context]:
    """Open a scope that inherits nothing, for one job, message or unit of work, until the block ends.

        with scope():
            update(user_id=job.user_id)
            work(job)

    It starts with the given values, such as `with scope(**carried)` in a job. Raises TypeError as `bind`
    does.
    """
    begun = begin_empty(**values)
    try:
        yield begun.scope.context
    finally:
        end(begun)


def carried() -> Values:
    """Return the bound values as text and numbers that a job can carry, without keys for unbound values.

        queue.enqueue("report", analytics=carried())        # and in the job: with scope(**analytics)

    A value that is not an id becomes the name of its type, so the job's events are refused like any event
    with an invalid id.
    """
    bound = current()
    values: dict[str, object] = {
        name: _portable(value) for name in _SCALARS if (value := getattr(bound, name)) is not None
    }
    if bound.extra:
        values["extra"] = {str(key): _json(value) for key, value in bound.extra.items()}
    return cast(Values, values)


def _portable(value: object) -> str | int:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__int__(value)
    return str(value) if isinstance(value, UUID) else type(value).__name__


def _json(value: object) -> object:
    try:
        return Converter(Alterations()).convert(value)
    except Refused:
        return type(value).__name__


def arrived(values: object) -> Values:
    """Return the carried values of a job's message: untrusted, since any process may have written to the queue."""
    if not isinstance(values, dict):
        return {}
    known: dict[str, Any] = {name: values[name] for name in _SCALARS if type(values.get(name)) in _CARRIED}
    if isinstance(extra := values.get("extra"), dict):
        known["extra"] = {key: value for key, value in extra.items() if isinstance(key, str)}
    return cast(Values, known)


class Begun(NamedTuple):
    """The state that `end` needs to end a scope."""

    scope: Scope
    token: Token[Scope | None]


def begin(**values: Unpack[Values]) -> Begun:
    """Begin a scope that lasts as long as this task or copy of the context, or until `end` is called with it.

    Raises TypeError as `bind` does.
    """
    outer = _scope.get()
    inner = Scope(_encoded((_NOBODY if outer is None else outer.context).replaced(**values)), _task())
    return Begun(inner, _scope.set(inner))


def begin_empty(**values: Unpack[Values]) -> Begun:
    """Begin a scope that inherits nothing, for a request: its thread may have served another user before.

    Raises TypeError as `bind` does.
    """
    context = _NOBODY.replaced(**values) if "extra" in values else Context(**values)
    inner = Scope(_encoded(context), _task())
    return Begun(inner, _scope.set(inner))


def resume(scope: Scope) -> Begun:
    """Make a scope current again, for a further part of its work, until `end` is called with the result."""
    return Begun(scope, _scope.set(scope))


def _encoded(context: Context) -> Context:
    if context.user_id is not None and context.family_unit_id is not None:
        context.encode()
    return context


def end(begun: Begun) -> None:
    """End a scope, in the copy of the context that it started in or in another one."""
    try:
        _scope.reset(begun.token)
    except ValueError:  # in another copy, which cannot be checked beforehand
        _end_elsewhere(begun.scope, begun.token.old_value)


def _end_elsewhere(ended: Scope, old_value: object) -> None:
    """Make each copy of the context that still holds the scope show the values bound outside it."""
    outer = old_value if isinstance(old_value, Scope) else None
    outside = Context() if outer is None else outer.context
    followers = [ended, *(ended.followers or ())]
    for each in followers:
        each.context = outside
    if outer is not None:
        outer.followers = outer.followers or WeakSet()
        outer.followers.update(followers)
    if _scope.get() is ended:
        _scope.set(outer)


def update(**values: Unpack[Values]) -> None:
    """Bind values for the rest of the current scope.

    In a task that was started within the scope, such as one of `asyncio.gather`, they are bound for that task
    and the tasks and threads that it starts afterwards.

    Outside a scope nothing is bound, because the values would remain until the thread's next request or job.
    The call is counted (`Stats.unbound`) and logged; with `strict` it raises ValueError. Raises TypeError for
    an unknown name.
    """
    inner = _scope.get()
    if inner is None:
        _NOBODY.replaced(**values)
        from spool.emitter import get_emitter  # which imports this module

        get_emitter().count_unbound()
        return
    bound, task = _encoded(inner.context.replaced(**values)), _task()
    if (
        task is None or task == inner.task
    ):  # a thread without tasks acts on behalf of the task that waits for it
        inner.context = bound
    else:
        own = Scope(bound, task)
        own.request = inner.request
        _scope.set(own)
