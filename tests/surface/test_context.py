"""The context of user and request: inherited by tasks and threads, never visible to siblings."""

from __future__ import annotations

import asyncio
import gc
import math
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import orjson
import pytest

from spool import Emitter
from spool.context import begin, bind, current, end, in_force, update
from spool.testing import Recorder, record
from tests.processes import shown


def test_what_is_bound_ends_with_its_block_and_nests() -> None:
    with bind(user_id="a", role="parent"):
        with bind(role="child", request_id="r"):
            assert (current().user_id, current().role, current().request_id) == ("a", "child", "r")
        assert (current().role, current().request_id) == ("parent", None)
    assert current().user_id is None
    with pytest.raises(TypeError):
        bind(users=1).__enter__()  # type: ignore[call-arg]


def test_a_thread_with_a_copy_of_the_context_can_tell_its_request_who_the_user_is() -> None:
    with bind(request_id="r"), ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, lambda: update(user_id="from a thread")).result()
        assert current().user_id == "from a thread"
    assert current().user_id is None


def test_a_block_may_end_in_another_copy_of_the_context_and_leaves_nobody_there() -> None:
    def generator() -> Generator[None, None, None]:
        with bind(user_id="inner", role="child"), bind(request_id="r"):
            yield

    with bind(user_id="outer"):
        first, second = copy_context(), copy_context()
        running = generator()
        first.run(next, running)
        assert first.run(current).user_id == "inner"
        inherited = first.copy()
        second.run(running.close)
        for each in (first, second, inherited):
            found = each.run(current)
            assert (found.user_id, found.role, found.request_id) == ("outer", None, None)
        assert current().user_id == "outer"
    assert current().user_id is None


def test_a_block_that_ends_in_a_copy_of_its_own_context_ends_there() -> None:
    def generator() -> Generator[None, None, None]:
        with bind(user_id="inner"):
            yield

    running = generator()
    first = copy_context()
    first.run(next, running)
    later = first.copy()
    later.run(running.close)
    assert later.run(in_force) is None
    assert first.run(current).user_id is None


def test_blocks_that_end_elsewhere_take_no_memory() -> None:
    with bind(request_id="r") as outer:
        for _ in range(100):
            begun = copy_context().run(begin, user_id="u")
            end(begun)
        inner = begun.scope
        del begun
        gc.collect()
        outside = in_force()
        assert outside is not None and outside.followers is not None
        assert set(outside.followers) == {inner} and inner.context is outer


def test_what_is_bound_is_spliced_into_each_line_and_what_the_call_gives_wins(
    emitter: Emitter, recorded: Recorder
) -> None:
    user, other = uuid.uuid4(), uuid.uuid4()
    with bind(user_id=user, family_unit_id=user, role='"quoted"', request_id="r\0"):
        emitter.emit_event(event_type="one")
        emitter.emit_event(event_type="one", metadata={})
        emitter.emit_event(event_type="one", metadata={"a": 1, "role": "own"})
        emitter.emit_event(event_type="one", user_id=other, metadata={"a": {"b": None}})
        emitter.emit_event(event_type="one", metadata={"a": orjson.Fragment(b'1,"role":"own"')})
    with bind(user_id=user, family_unit_id=user):
        emitter.emit_event(event_type="one", session_id=other)
        emitter.emit_event(event_type="one", metadata={"a": {"b": None}})
    given = {"role": '"quoted"', "request_id": "r\ufffd"}
    assert [(event["user_id"], event["session_id"], event["metadata"]) for event in recorded.events] == [
        (str(user), None, given),
        (str(user), None, given),
        (str(user), None, given | {"a": 1, "role": "own"}),
        (str(other), None, given | {"a": {"b": None}}),
        (str(user), None, given | {"a": 1, "role": "own"}),
        (str(user), str(other), {}),
        (str(user), None, {"a": {"b": None}}),
    ]


@pytest.mark.parametrize(
    "bound",
    [{"user_id": "nobody"}, {"role": math.nan}, {"user_id": 1}],
    ids=shown,
)
def test_an_invalid_bound_value_is_refused_by_the_emit_and_never_raises_at_the_bind(
    tmp_path: Path, bound: dict[str, Any]
) -> None:
    emitter, user = Emitter(tmp_path), uuid.uuid4()
    with bind(**{"user_id": user, "family_unit_id": user, "role": "parent", "request_id": "r", **bound}):
        assert emitter.emit_event(event_type="one", metadata={"a": 1}) is None
    assert sum(emitter.stats().dropped.values()) == 1


def test_a_role_is_redacted_if_the_list_has_it(tmp_path: Path) -> None:
    emitter, user = Emitter(tmp_path, redact={"role"}), uuid.uuid4()
    with record(emitter) as recorded, bind(user_id=user, family_unit_id=user, role="parent", request_id="r"):
        emitter.emit_event(event_type="one", metadata={"a": 1})
    assert recorded.events[0]["metadata"] == {"role": "[redacted]", "request_id": "r", "a": 1}


def test_requests_that_run_at_once_never_mix(emitter: Emitter, recorded: Recorder) -> None:
    async def later(number: int) -> None:
        await asyncio.sleep(0)
        emitter.emit_event(event_type="later", metadata={"number": number})

    async def request(number: int) -> None:
        user = uuid.UUID(int=number)
        with bind(request_id=str(number)):
            await asyncio.to_thread(update, user_id=user, family_unit_id=user)
            for _ in range(10):
                await asyncio.sleep(0)
                emitter.emit_event(event_type="tick", metadata={"number": number})
            background = asyncio.create_task(later(number))
        await background

    async def main() -> None:
        await asyncio.gather(*(request(number) for number in range(1, 50)))

    asyncio.run(main())
    assert len(recorded.events) == 49 * 11
    for event in recorded.events:
        number = event["metadata"]["number"]
        assert event["user_id"] == str(uuid.UUID(int=number))
        assert event["metadata"]["request_id"] == str(number)
