"""The result of a call that has emitted already, for callers that await it and for those that do not.

    log_memory_posted(memory_id=memory.id)             # a sync view
    await log_memory_posted(memory_id=memory.id)       # an async view
    tasks.add_task(log_memory_posted, memory_id=memory.id)

An `async def` would emit at the `await`, and never without one. `Emitted` has all of a coroutine's methods, so
asyncio.run, create_task and gather take it, and nothing warns if it is never awaited.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Final, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Emitted(Coroutine[Any, Any, "str | None"]):
    """Awaiting it, any number of times, returns the id of what was emitted, None if it was dropped.

    It has no constructor of its own, which would make the call of an awaitable 5 % slower. Make it before the
    emit: near the recursion limit there may be no room for that afterwards.
    """

    __slots__ = ("event_id",)
    event_id: str | None

    def __await__(self) -> Generator[Any, Any, str | None]:
        return self.event_id
        yield

    def send(self, value: object, /) -> Any:
        """End at once, as a coroutine that waits for nothing. Raises StopIteration with the id."""
        try:
            end = StopIteration(self.event_id)
        except RecursionError:  # no room to make one
            end = _END
            end.__traceback__ = None
        raise end

    def throw(
        self,
        kind: type[BaseException] | BaseException,
        value: BaseException | object = None,
        trace: TracebackType | None = None,
        /,
    ) -> Any:
        """Raise what is thrown in, such as a cancellation: the event is emitted nevertheless."""
        raise kind if value is None else value  # type: ignore[misc]  # an instance of `kind`

    def close(self) -> None:
        """Do nothing: no code is suspended."""


_END: Final = StopIteration()
NOT_EMITTED: Final = Emitted()
"""What a call returns that had no room for another one near the recursion limit."""
NOT_EMITTED.event_id = None


def coroutine_function(function: Function) -> Function:
    """Mark a function that returns `Emitted` for frameworks that ask whether they may await its result.

    Without the mark, Starlette would run it in a thread, which takes ten times as long as an emit. Python 3.11
    has the mark in asyncio, which takes longer to import than this package: a process that has not imported
    it is left alone.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    coroutines = sys.modules.get("asyncio.coroutines")
    if coroutines is not None:
        function._is_coroutine = coroutines._is_coroutine  # type: ignore[attr-defined]
    return function
