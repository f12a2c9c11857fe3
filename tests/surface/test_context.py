"""Who acts and in which request: inherited by tasks and threads, never seen by siblings."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from spool import Emitter
from spool.context import bind, current, update
from spool.testing import Recorder


def test_what_is_bound_ends_with_its_block_and_nests() -> None:
    with bind(user_id="a", role="parent"):
        with bind(role="child", request_id="r"):
            assert (current().user_id, current().role, current().request_id) == ("a", "child", "r")
        assert (current().role, current().request_id) == ("parent", None)
    assert current().user_id is None
    with pytest.raises(TypeError):
        bind(users=1).__enter__()


def test_a_thread_with_a_copy_of_the_context_can_tell_its_request_who_the_user_is() -> None:
    with bind(request_id="r"), ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, lambda: update(user_id="from a thread")).result()
        assert current().user_id == "from a thread"
    assert current().user_id is None


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
