"""Who is acting and in which request, for whatever is emitted meanwhile.

    with bind(user_id=user.id, family_unit_id=user.family_unit_id, role="parent"):
        await analytics.emit_event(event_type="feed_viewed")

    update(user_id=user.id)      # for the rest of the request, as a dependency that knows the user does

A scope is held in a context variable: asyncio tasks, threads of Starlette's pool and background tasks inherit
it, siblings never see it. What is bound to a scope can be replaced in it, so that a dependency which ran in a
thread, in a copy of the request's context, is heard by the endpoint, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack


class Values(TypedDict, total=False):
    """What can be bound."""

    user_id: Any
    family_unit_id: Any
    session_id: Any
    role: str | None
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Context:
    """What was bound; None where nothing was."""

    user_id: Any = None
    family_unit_id: Any = None
    session_id: Any = None
    role: str | None = None
    request_id: str | None = None

    def metadata(self) -> dict[str, str]:
        """Return what of it goes into the metadata of events."""
        if self.role is None:
            return {} if self.request_id is None else {"request_id": self.request_id}
        extra = {"role": self.role}
        if self.request_id is not None:
            extra["request_id"] = self.request_id
        return extra


class Scope:
    """A stretch of work, such as a request, with what is bound to it at the moment."""

    __slots__ = ("context",)

    def __init__(self, context: Context) -> None:
        self.context = context


_scope: ContextVar[Scope | None] = ContextVar("analytics", default=None)
scope = _scope.get
"""The scope in force, or None."""


def current() -> Context:
    """Return what is bound."""
    there = _scope.get()
    return Context() if there is None else there.context


@contextmanager
def bind(**values: Unpack[Values]) -> Iterator[Context]:
    """Bind `user_id`, `family_unit_id`, `session_id`, `role` or `request_id` until the block ends.

    What is not named stays as it was bound outside. Raises TypeError for another name.
    """
    token = begin(**values)
    try:
        yield current()
    finally:
        end(token)


def begin(**values: Unpack[Values]) -> Token[Scope | None]:
    """Begin a scope that lasts as long as this task or copy of a context, or until it is given to `end`.

    Raises TypeError as `bind`.
    """
    there = _scope.get()
    return _scope.set(Scope(Context(**values) if there is None else replace(there.context, **values)))


end = _scope.reset
"""End a scope. Raises ValueError in another context than it began in."""


def update(**values: Unpack[Values]) -> None:
    """Bind for the rest of the scope in force, or of this task or thread where there is none.

    Raises TypeError for another name.
    """
    there = _scope.get()
    if there is None:
        begin(**values)
    else:
        there.context = replace(there.context, **values)
