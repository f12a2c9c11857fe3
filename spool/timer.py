"""A timer for a block or a function, sync or async."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spool.annotations import Metadata
from spool.kinds import Kind, kind_of

if TYPE_CHECKING:
    from spool.emitter import Emitter

Function = TypeVar("Function", bound=Callable[..., Any])


class Timer:
    """Records the duration of each run in milliseconds, also of runs that raise.

        with emitter.timer("feed_query_ms", labels={"kind": "home"}): ...

        @emitter.timer("thumbnail_ms")
        async def make_thumbnail(photo): ...

    A decorator may run in many threads and tasks at once; as a block, a timer can be used only once.

    A coroutine is timed to its end. A generator, sync or async, is timed from its first item to its end,
    including the time spent in its consumer. Raises TypeError for a class and for an object that is not
    callable.
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
            self._end(begin, raised=kind is not None)
        except RecursionError:
            self._emitter._drops.too_deep += 1

    async def __aenter__(self) -> Timer:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begin = self._started.pop()
        try:
            self._end(begin, raised=kind is not None)
        except RecursionError:
            self._emitter._drops.too_deep += 1

    def __call__(self, function: Function) -> Function:
        """Return the timed function, with the same signature and kind."""
        if isinstance(function, (staticmethod, classmethod)):
            return cast(Function, type(function)(self(function.__func__)))
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"cannot time {function!r}: decorate a function or a method")
        timed = _TIMED[kind_of(function)](self, function)
        return cast(Function, functools.wraps(function)(timed))

    def _end(self, begin: int, *, raised: bool) -> None:
        try:
            duration = (time.perf_counter_ns() - begin) / 1_000_000
            self._emitter.record_timer(
                metric_name=self._metric_name, duration_ms=duration, labels=self._labels
            )
        except RecursionError:
            self._emitter._drops.too_deep += 1
        except ValueError:  # with `strict`
            if not raised:
                raise


class _Run:
    """One run of a function. It ends at the function's own frame depth, so it also works near the recursion limit."""

    __slots__ = ("_begin", "_timer")

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._begin = 0

    def __enter__(self) -> None:
        self._begin = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._timer._end(self._begin, raised=kind is not None)
        except RecursionError:
            self._timer._emitter._drops.too_deep += 1


def _timed_call(timer: Timer, function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter_ns()
        raised = True
        result = None
        try:
            result = function(*args, **kwargs)
            raised = False
        finally:
            if (kind := _SUSPENDED.get(type(result))) is None:
                try:
                    timer._end(begin, raised=raised)
                except RecursionError:
                    timer._emitter._drops.too_deep += 1
        if kind is not None:  # another decorator hid the kind of the function
            return _TIMED[kind](timer, lambda: result)()
        return result

    return called


def _timed_coroutine(timer: Timer, function: Callable[..., Any]) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        with _Run(timer):
            return await function(*args, **kwargs)

    return awaited


def _timed_generator(timer: Timer, function: Callable[..., Any]) -> Callable[..., Generator[Any, Any, Any]]:
    def iterated(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with _Run(timer):
            return (yield from function(*args, **kwargs))

    return iterated


def _timed_async_generator(
    timer: Timer, function: Callable[..., Any]
) -> Callable[..., AsyncGenerator[Any, Any]]:
    async def iterated(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with _Run(timer):
            generator = function(*args, **kwargs)
            step = anext(generator)
            while True:  # `yield from`, which async generators do not support
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                try:
                    step = generator.asend((yield item))
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as error:
                    step = generator.athrow(error)

    return iterated


_TIMED = {
    Kind.RESULT: _timed_call,
    Kind.COROUTINE: _timed_coroutine,
    Kind.GENERATOR: _timed_generator,
    Kind.ASYNC_GENERATOR: _timed_async_generator,
}
_SUSPENDED = {
    CoroutineType: Kind.COROUTINE,
    GeneratorType: Kind.GENERATOR,
    AsyncGeneratorType: Kind.ASYNC_GENERATOR,
}
