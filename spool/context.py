"""Who is acting and in which request, for whatever is emitted meanwhile.

    with bind(user_id=user.id, family_unit_id=user.family_unit_id, role="parent"):
        await analytics.emit_event(event_type="feed_viewed")

Held in a context variable: asyncio tasks and Starlette's thread pool inherit it, siblings never see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Context:
    """What was bound; None where nothing was."""

    user_id: Any = None
    family_unit_id: Any = None
    session_id: Any = None
    role: str | None = None
    request_id: str | None = None


_context: ContextVar[Context | None] = ContextVar("analytics", default=None)
current = _context.get
"""The context in force, or None."""


@contextmanager
def bind(**values: Any) -> Iterator[Context]:
    """Bind `user_id`, `family_unit_id`, `session_id`, `role` or `request_id` until the block ends.

    What is not named stays as it was bound outside. Raises TypeError for another name.
    """
    token = _context.set(replace(_context.get() or Context(), **values))
    try:
        yield _context.get() or Context()
    finally:
        _context.reset(token)
