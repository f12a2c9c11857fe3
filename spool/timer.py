"""A timer for a block or a function, sync or async."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spool.annotations import Metadata

if TYPE_CHECKING:
    from spool.emitter import Emitter

Function = TypeVar("Function", bound=Callable[..., Any])


class Timer:
    """Records the milliseconds of each run, also of one that raises.

        with emitter.timer("feed_query_ms", labels={"kind": "home"}): ...

        @emitter.timer("thumbnail_ms")
        async def make_thumbnail(photo): ...

    As a decorator it may run in many threads and tasks at once; as a block, one timer is for one block.
    """

    def __init__(self, emitter: Emitter, metric_name: str, labels: Metadata | None) -> None:
        self._emitter = emitter
        self._metric_name = metric_name
        self._labels = labels
        self._started: list[int] = []

    def __enter__(self) -> Timer:
        self._started.append(time.perf_counter_ns())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begin = self._started.pop()
        try:
            self._end(begin)
        except RecursionError:
            self._emitter._drops.too_deep += 1

    async def __aenter__(self) -> Timer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begin = self._started.pop()
        try:
            self._end(begin)
        except RecursionError:
            self._emitter._drops.too_deep += 1

    def __call__(self, function: Function) -> Function:
        """Return the function, timed; its signature stays."""

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return await function(*args, **kwargs)
            finally:
                try:
                    self._end(begin)
                except RecursionError:
                    self._emitter._drops.too_deep += 1

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                try:
                    self._end(begin)
                except RecursionError:
                    self._emitter._drops.too_deep += 1

        return cast(Function, awaited if inspect.iscoroutinefunction(function) else called)

    def _end(self, begin: int) -> None:
        duration = (time.perf_counter_ns() - begin) / 1_000_000
        try:
            self._emitter.record_timer(
                metric_name=self._metric_name, duration_ms=duration, labels=self._labels
            )
        except RecursionError:
            self._emitter._drops.too_deep += 1
