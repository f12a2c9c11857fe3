"""Every awaitable call emits when it is called: in sync views, async views and background tasks."""

from __future__ import annotations

import asyncio
import gc
import inspect
import uuid
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient

from spool import AnalyticsService, Emitter, get_emitter
from spool.events import log_pet_created
from spool.metrics import log_feed_interaction
from spool.testing import Recorder, record, recorder

__all__ = ["recorder"]

USER = uuid.uuid4()
WHO: dict[str, Any] = {"user_id": USER, "family_unit_id": USER}


def calls(
    service: AnalyticsService,
) -> list[tuple[Callable[..., Coroutine[Any, Any, str | None]], dict[str, Any]]]:
    return [
        (log_pet_created, {"pet_id": USER, **WHO}),
        (log_feed_interaction, {"interaction_type": "like", **WHO}),
        (service.emit_event, {"event_type": "seen", **WHO}),
        (service.increment_counter, {"metric_name": "hits"}),
        (service.record_gauge, {"metric_name": "hits", "value": 1}),
        (service.record_timer, {"metric_name": "hits", "duration_ms": 1}),
        (service.record_metric, {"metric_name": "hits", "metric_type": "gauge", "value": 1}),
    ]


CALLS = range(len(calls(AnalyticsService(get_emitter()))))


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[[], Coroutine[Any, Any, str | None]]:
    function, arguments = calls(AnalyticsService(get_emitter()))[request.param]
    return lambda: function(**arguments)


def test_a_call_that_is_never_awaited_emits_and_warns_of_nothing(
    call: Callable[[], object], recorder: Recorder
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        gc.collect()
    assert recorder.records


def test_a_call_emits_once_whoever_awaits_it(
    call: Callable[[], Coroutine[Any, Any, str | None]], recorder: Recorder
) -> None:
    async def main() -> list[str | None]:
        made = call()
        found = [await made, await made, await asyncio.wait_for(made, 1), await asyncio.create_task(made)]
        return [*found, *await asyncio.gather(made), await asyncio.ensure_future(made)]

    ids = asyncio.run(main())
    last = recorder.records[-1]["event_id"]
    assert ids == [last] * 6
    recorder.clear()
    assert asyncio.run(call()) == recorder.records[-1]["event_id"]


def test_a_task_that_is_cancelled_before_it_runs_has_emitted(
    call: Callable[[], Coroutine[Any, Any, str | None]], recorder: Recorder
) -> None:
    async def main() -> None:
        task = asyncio.create_task(call())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert recorder.records


def test_a_dropped_line_is_none_when_it_is_awaited(tmp_path: Path) -> None:
    service = AnalyticsService(Emitter(tmp_path))
    assert asyncio.run(service.emit_event(event_type="No Name", **WHO)) is None
    assert asyncio.run(service.increment_counter(metric_name="hits", value=-1)) is None
    assert sum(service.emitter.stats().dropped.values()) == 2


def test_sync_views_async_views_and_background_tasks_use_the_same_call(recorder: Recorder) -> None:
    app = FastAPI()
    service = AnalyticsService(get_emitter())

    @app.get("/sync")
    def sync() -> None:
        log_pet_created(pet_id=USER, species="sync", **WHO)

    @app.get("/async")
    async def unawaited() -> None:
        log_pet_created(pet_id=USER, species="async", **WHO)

    @app.get("/awaited")
    async def awaited() -> None:
        await log_pet_created(pet_id=USER, species="awaited", **WHO)

    @app.get("/later")
    def later(tasks: BackgroundTasks) -> None:
        tasks.add_task(log_pet_created, pet_id=USER, species="later", **WHO)
        tasks.add_task(service.emit_event, event_type="seen", metadata={"species": "seen"}, **WHO)

    client = TestClient(app)
    for path in ("sync", "async", "awaited", "later"):
        assert client.get(f"/{path}").status_code == 200
    found = [made["metadata"]["species"] for made in recorder.events]
    assert found == ["sync", "async", "awaited", "later", "seen"]


@pytest.mark.parametrize("number", CALLS)
def test_frameworks_see_a_coroutine_function(number: int) -> None:
    function: Any = calls(AnalyticsService(get_emitter()))[number][0]
    assert asyncio.iscoroutinefunction(function) or asyncio.iscoroutinefunction(function.__call__)


def test_the_result_is_a_coroutine_to_asyncio(recorder: Recorder) -> None:
    made = log_pet_created(pet_id=USER, **WHO)
    assert inspect.isawaitable(made) and asyncio.iscoroutine(made) and isinstance(made, Awaitable)
    made.close()


def test_an_invalid_call_raises_immediately_when_strict(tmp_path: Path) -> None:
    service = AnalyticsService(Emitter(tmp_path, strict=True))
    with pytest.raises(ValueError, match="event_type"):
        service.emit_event(event_type="No Name", **WHO)
    with record(service.emitter) as recording:
        service.emit_event(event_type="seen", **WHO)
    assert recording.records
