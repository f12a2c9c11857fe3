"""The catalogue of events, its helpers, the decorator, timers, and the recorder for users' tests."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from fastapi import BackgroundTasks, FastAPI
from starlette.testclient import TestClient

from spool import AnalyticsService, Emitter, events
from spool.context import bind
from spool.events import CATALOGUE, emits, event, log_memory_posted, log_pet_created
from spool.metrics import log_feed_interaction
from spool.testing import Recorder, record, recorder

__all__ = ["recorder"]

USER, FAMILY, MEMORY = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
WHO: dict[str, Any] = {"user_id": USER, "family_unit_id": FAMILY}
STANDARD = [
    "user_registered",
    "user_logged_in",
    "user_logged_out",
    "memory_posted",
    "memory_updated",
    "memory_deleted",
    "memory_viewed",
    "reaction_created",
    "reaction_deleted",
    "comment_created",
    "comment_updated",
    "comment_deleted",
    "feed_viewed",
    "invite_created",
    "invite_accepted",
    "child_provisioned",
    "pet_created",
]


def test_each_standard_event_has_a_helper_that_emits_it(recorder: Recorder) -> None:
    samples: dict[type, Any] = {UUID: MEMORY, str: "text", int: 3}
    for name in STANDARD:
        helper = getattr(events, f"log_{name}")
        metadata = {key: samples[field.kind] for key, field in CATALOGUE[name].fields.items()}
        assert asyncio.run(helper(**WHO, **metadata)) is not None
        (made,) = recorder.of(name)
        assert made["user_id"] == str(USER)
        assert made["metadata"] == {k: str(v) if v == MEMORY else v for k, v in metadata.items()}


def test_a_helper_takes_who_from_the_context_and_leaves_out_what_is_none(recorder: Recorder) -> None:
    with bind(**WHO, role="parent"):
        log_memory_posted.emit(memory_id=str(MEMORY), media_type=None)
    (made,) = recorder.events
    assert made["metadata"] == {"role": "parent", "memory_id": str(MEMORY)}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "needs memory_id"),
        ({"memory_id": MEMORY, "colour": 1}, "has no colour"),
        ({"memory_id": "mine"}, "memory_id is not a UUID"),
        ({"memory_id": MEMORY, "media_count": "3"}, "media_count must be int, not str"),
        ({"memory_id": MEMORY, "media_count": True}, "media_count must be int, not bool"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    recorder: Recorder, metadata: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        log_memory_posted.emit(**WHO, **metadata)
    assert not recorder.records


def test_an_application_adds_its_own_events(recorder: Recorder) -> None:
    log_album_shared = event("album_shared", "An album was shared.", album_id=UUID, note=str | None)
    try:
        asyncio.run(log_album_shared(**WHO, album_id=MEMORY))
        assert recorder.of("album_shared") and "album_shared" in events.reference()
        with pytest.raises(ValueError, match="already"):
            event("album_shared", "Something else.", other=int)
    finally:
        del CATALOGUE["album_shared"]


class Posted:
    def __init__(self) -> None:
        self.id = MEMORY
        self.media = {"count": 2}


def test_emits_takes_metadata_from_arguments_and_result(recorder: Recorder) -> None:
    @emits("memory_posted", memory_id="result.id", media_count="result.media.count", media_type="kind")
    def post(kind: str = "photo") -> Posted:
        """Post."""
        return Posted()

    @emits("pet_created", pet_id=lambda arguments, result: result, species="animal.species")
    async def adopt(animal: dict[str, str]) -> UUID:
        return MEMORY

    with bind(**WHO):
        assert isinstance(post(), Posted)
        assert asyncio.run(adopt({"species": "cat"})) == MEMORY
    assert recorder.of("memory_posted")[0]["metadata"] == {
        "memory_id": str(MEMORY), "media_type": "photo", "media_count": 2
    }  # fmt: skip
    assert recorder.of("pet_created")[0]["metadata"] == {"pet_id": str(MEMORY), "species": "cat"}
    assert inspect.signature(post) == inspect.signature(inspect.unwrap(post)) and post.__doc__ == "Post."


def test_emits_raises_what_the_function_raises_and_emits_nothing(recorder: Recorder) -> None:
    @emits("pet_created", pet_id="result")
    def fail() -> UUID:
        raise LookupError("no such animal")

    with pytest.raises(LookupError, match="no such animal"), bind(**WHO):
        fail()
    assert not recorder.records


def test_emits_never_alters_a_result_because_of_a_source_that_is_not_there(tmp_path: Path) -> None:
    @emits("pet_created", pet_id="result.missing.deeply")
    def answer() -> int:
        return 42

    with record(strict=False) as recording:
        assert answer() == 42
    assert not recording.records


def test_helpers_and_emits_in_a_fastapi_application(recorder: Recorder) -> None:
    app = FastAPI()

    @app.post("/pets")
    @emits("pet_created", pet_id="result.id", user_id="user", family_unit_id="user")
    async def post_pet(user: UUID, tasks: BackgroundTasks) -> dict[str, UUID]:
        tasks.add_task(log_memory_posted, user_id=user, family_unit_id=user, memory_id=MEMORY)
        return {"id": MEMORY}

    answer = TestClient(app).post("/pets", params={"user": str(USER)})
    assert answer.json() == {"id": str(MEMORY)}
    assert [made["event_type"] for made in recorder.events] == ["pet_created", "memory_posted"]


def test_timers_time_blocks_and_functions_also_those_that_raise(recorder: Recorder, tmp_path: Path) -> None:
    service = AnalyticsService(Emitter(tmp_path / "spool"))

    @service.timer("work_ms", {"kind": "sync"})
    def work() -> int:
        return 1

    @service.timer("work_ms", {"kind": "async"})
    async def work_later() -> int:
        await asyncio.sleep(0.01)
        return 2

    async def block() -> None:
        async with service.timer("work_ms", {"kind": "block"}):
            raise LookupError

    with record(service.emitter) as recording:
        assert (work(), asyncio.run(work_later())) == (1, 2)
        with pytest.raises(LookupError):
            asyncio.run(block())
    made = {each["labels"]["kind"]: each["value"] for each in recording.of("work_ms")}
    assert made.keys() == {"sync", "async", "block"}
    assert made["async"] >= 10 and 0 <= made["sync"] < 1000


def test_a_feed_interaction_is_an_event_and_a_count(recorder: Recorder) -> None:
    asyncio.run(log_feed_interaction(**WHO, interaction_type="like", metadata={"position": 3}))
    (made,) = recorder.events
    (count,) = recorder.metrics
    assert made["metadata"] == {"position": 3, "interaction_type": "like"}
    assert (count["metric_name"], count["labels"]) == ("feed_interaction_count", {"interaction_type": "like"})


def test_the_recorder_keeps_the_spool_empty_and_lets_go_afterwards(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path / "spool")
    with record(emitter) as recording:
        emitter.increment_counter(metric_name="hits")
        assert len(recording.metrics) == 1 and not (tmp_path / "spool").exists()
        recording.clear()
        assert not recording.records
        with pytest.raises(ValueError):
            emitter.increment_counter(metric_name="hits", value=-1)
    emitter.increment_counter(metric_name="hits")
    emitter.close()
    assert len(list((tmp_path / "spool").iterdir())) == 1


def test_a_pet_without_who_is_refused(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="user_id is missing"):
        log_pet_created.emit(pet_id=MEMORY)
