"""The result of a call that has already emitted, whether or not the caller awaits it.

    log_memory_posted(memory_id=memory.id)             # a sync view
    await log_memory_posted(memory_id=memory.id)       # an async view
    tasks.add_task(log_memory_posted, memory_id=memory.id)

An `async def` would emit only when awaited. `Emitted` has all methods of a coroutine, so asyncio.run,
create_task and gather accept it, and there is no warning if it is never awaited.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Final, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Emitted(Coroutine[Any, Any, "str | None"]):
    """An awaitable of the id of what was emitted, or of None if it was dropped. It can be awaited repeatedly.

    It has no `__init__`, which would make an awaitable call 5 % slower. Create it before the emit: near the
    recursion limit there may be no frame left to do so afterwards.
    """

    __slots__ = ("event_id",)
    event_id: str | None

    def __await__(self) -> Generator[Any, Any, str | None]:
        return self.event_id
        yield

    def send(self, value: object, /) -> Any:
        """Finish immediately, like a coroutine that never suspends. Raises StopIteration with the id."""
        try:
            end = StopIteration(self.event_id)
        except RecursionError:  # no frame left to create one
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
        """Raise the given exception, such as a cancellation. The event has already been emitted."""
        raise kind if value is None else value  # type: ignore[misc]  # an instance of `kind`

    def close(self) -> None:
        """Do nothing, because no code is suspended."""


_END: Final = StopIteration()
NOT_EMITTED: Final = Emitted()
"""Returned by a call that had no frame left to create one near the recursion limit."""
NOT_EMITTED.event_id = None


def coroutine_function(function: Function) -> Function:
    """Mark a function that returns `Emitted` as a coroutine function, for frameworks that check this.

    Without the mark, Starlette would run it in a thread, which takes ten times as long as an emit. In Python
    3.11 the mark is part of asyncio, which takes longer to import than this package, so it is set only if the
    process has already imported asyncio.
    """
    if sys.version_info >= (3, 12):
        return inspect.markcoroutinefunction(function)
    coroutines = sys.modules.get("asyncio.coroutines")
    if coroutines is not None:
        function._is_coroutine = coroutines._is_coroutine  # type: ignore[attr-defined]
    return function
