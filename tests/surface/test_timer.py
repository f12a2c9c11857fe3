"""`@timer` measures results of every kind, and never replaces an exception of the application."""

from __future__ import annotations

import asyncio
import functools
import inspect
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from spool import Emitter
from spool.context import bind
from spool.events import emits
from spool.fields import DeclarationError
from spool.testing import Recorder, record

SLEEP = 0.02
USER = uuid.uuid4()


class Measured:
    """Functions, methods and objects of each kind, which take two pauses each."""

    async def coroutine(self) -> int:
        for _ in range(2):
            await asyncio.sleep(SLEEP / 2)
        return 7

    def generator(self) -> Iterator[int]:
        for number in range(2):
            yield number

    async def async_generator(self) -> AsyncIterator[int]:
        for number in range(2):
            await asyncio.sleep(SLEEP / 2)
            yield number


class AsyncCallable:
    async def __call__(self, value: int) -> int:
        await asyncio.sleep(SLEEP)
        return value


def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that hides the decorated function."""
    return lambda *args: function(*args)


def durations(recorded: Recorder) -> list[float]:
    return [each["value"] for each in recorded.of("work_ms")]


def check_async(function: Any, *args: Any) -> Any:
    async def wait() -> Any:
        return await function(*args)

    return asyncio.run(wait())


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (Measured().coroutine, ()), (AsyncCallable(), (7,)), (functools.partial(AsyncCallable(), 7), ()),
        (functools.partial(Measured.coroutine, Measured()), ()), (hidden(Measured().coroutine), ()),
    ],
    ids=["method", "object", "partial object", "partial", "hidden"],
)  # fmt: skip
def test_a_coroutine_is_timed_to_its_end(
    emitter: Emitter, recorded: Recorder, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    assert check_async(emitter.timer("work_ms")(function), *args) == 7
    (duration,) = durations(recorded)
    assert duration >= SLEEP * 1000


async def listed(items: AsyncIterator[int]) -> list[int]:
    return [item async for item in items]


def test_generators_are_timed_from_their_first_item_to_their_end(
    emitter: Emitter, recorded: Recorder
) -> None:
    timer = emitter.timer("work_ms")
    measured = Measured()
    for function in (measured.generator, hidden(measured.generator)):
        items = timer(function)()
        assert not durations(recorded)
        assert list(items) == [0, 1]
        assert len(durations(recorded)) == 1
        recorded.clear()
    for function in (measured.async_generator, hidden(measured.async_generator)):
        assert asyncio.run(listed(timer(function)())) == [0, 1]
        (duration,) = durations(recorded)
        assert duration >= SLEEP * 1000
        recorded.clear()


def test_the_kind_of_a_timed_function_stays(emitter: Emitter) -> None:
    timer = emitter.timer("work_ms")
    assert inspect.iscoroutinefunction(timer(Measured.coroutine))
    assert inspect.isgeneratorfunction(timer(Measured.generator))
    assert inspect.isasyncgenfunction(timer(Measured.async_generator))
    assert inspect.iscoroutinefunction(timer(AsyncCallable()))
    assert inspect.signature(timer(AsyncCallable())) == inspect.signature(AsyncCallable())


def test_a_timed_generator_passes_on_what_it_is_sent_and_thrown(emitter: Emitter, recorded: Recorder) -> None:
    seen: list[Any] = []

    def talk() -> Any:
        try:
            seen.append((yield 1))
        except LookupError:
            seen.append("thrown")
        try:
            yield 2
        finally:
            seen.append("closed")
        return 3

    async def talk_async() -> Any:
        try:
            seen.append((yield 1))
        except LookupError:
            seen.append("thrown")
        try:
            yield 2
        finally:
            await asyncio.sleep(0)
            seen.append("closed")

    async def run(first: Any) -> None:
        timed: Any = emitter.timer("work_ms")(talk_async)
        items = timed()
        assert await anext(items) == 1
        assert await first(items) == 2
        await items.aclose()

    first: Any
    for first in (lambda items: items.send("sent"), lambda items: items.throw(LookupError())):
        sync: Any = emitter.timer("work_ms")(talk)
        items = sync()
        assert (next(items), first(items)) == (1, 2)
        items.close()
    for first in (lambda items: items.asend("sent"), lambda items: items.athrow(LookupError())):
        asyncio.run(run(first))
    assert seen == ["sent", "closed", "thrown", "closed"] * 2
    assert len(durations(recorded)) == 4


def test_timed_context_managers_work(emitter: Emitter, recorded: Recorder) -> None:
    @contextmanager
    @emitter.timer("work_ms")
    def block() -> Iterator[int]:
        yield 7

    @asynccontextmanager
    @emitter.timer("work_ms")
    async def block_async() -> AsyncIterator[int]:
        try:
            yield 7
        except LookupError:
            raise KeyError from None

    async def run() -> None:
        async with block_async():
            raise LookupError

    with block() as value:
        assert value == 7
    with pytest.raises(KeyError):
        asyncio.run(run())
    assert len(durations(recorded)) == 2


def test_static_and_class_methods_stay_such(emitter: Emitter, recorded: Recorder) -> None:
    class Photos:
        @emitter.timer("work_ms")
        @staticmethod
        def count(number: int) -> int:
            return number

        @emitter.timer("work_ms")
        @classmethod
        def name(cls) -> str:
            return cls.__name__

    assert (Photos().count(3), Photos.count(3), Photos().name()) == (3, 3, "Photos")
    assert len(durations(recorded)) == 3


@pytest.mark.parametrize(
    "wrong", [Measured, 7, None, property(lambda self: 1)], ids=["class", "number", "None", "property"]
)
def test_what_is_no_function_is_refused(emitter: Emitter, wrong: Any) -> None:
    with pytest.raises(TypeError, match="cannot time"):
        emitter.timer("work_ms")(wrong)


class OfTheApplication(Exception):
    pass


def raises() -> None:
    raise OfTheApplication


async def raises_later() -> None:
    raise OfTheApplication


def raises_among() -> Iterator[int]:
    yield 1
    raise OfTheApplication


async def raises_among_async() -> AsyncIterator[int]:
    yield 1
    raise OfTheApplication


@pytest.mark.parametrize("name", ["work_ms", "not snake case"])
def test_in_strict_mode_the_exception_is_the_applications(emitter: Emitter, name: str) -> None:
    def block() -> None:
        with emitter.timer(name):
            raise OfTheApplication

    async def block_async() -> None:
        async with emitter.timer(name):
            raise OfTheApplication

    timer = emitter.timer(name)
    runs: list[Callable[[], Any]] = [
        block, lambda: asyncio.run(block_async()), timer(raises), lambda: asyncio.run(timer(raises_later)()),
        lambda: list(timer(raises_among)()), lambda: asyncio.run(listed(timer(raises_among_async)())),
    ]  # fmt: skip
    with record(emitter):
        for run in runs:
            with pytest.raises(OfTheApplication):
                run()


def test_in_strict_mode_an_invalid_timer_is_reported_if_nothing_else_is(emitter: Emitter) -> None:
    with record(emitter), pytest.raises(ValueError, match="snake_case"):
        emitter.timer("not snake case")(lambda: 7)()


def test_emits_waits_for_objects_with_an_async_call_and_refuses_generators() -> None:
    decorated = emits("feed_viewed", page="value")(AsyncCallable())
    assert inspect.iscoroutinefunction(decorated)
    with record() as recorded, bind(user_id=USER, family_unit_id=USER):
        assert asyncio.run(decorated(7)) == 7
    assert recorded.of("feed_viewed")[0]["metadata"] == {"page": 7}
    for function in (Measured.generator, Measured.async_generator):
        with pytest.raises(DeclarationError, match="generator"):
            emits("feed_viewed")(function)
