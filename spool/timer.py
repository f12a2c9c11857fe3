"""A timer for a block or a function, sync or async."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class Timer:
    """Records the milliseconds of each run, also of one that raises.

        with emitter.timer("feed_query_ms", labels={"kind": "home"}): ...

        @emitter.timer("thumbnail_ms")
        async def make_thumbnail(photo): ...

    As a decorator it may run in many threads and tasks at once; as a block, one timer is for one block.
    """

    def __init__(self, record: Callable[[float], object]) -> None:
        self._record = record
        self._started: list[int] = []

    def __enter__(self) -> Timer:
        self._started.append(time.perf_counter_ns())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(self._started.pop())

    async def __aenter__(self) -> Timer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __call__(self, function: Function) -> Function:
        """Return the function, timed; its signature stays."""

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return await function(*args, **kwargs)
            finally:
                self._end(begin)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._end(begin)

        return cast(Function, awaited if inspect.iscoroutinefunction(function) else called)

    def _end(self, begin: int) -> None:
        self._record((time.perf_counter_ns() - begin) / 1_000_000)
