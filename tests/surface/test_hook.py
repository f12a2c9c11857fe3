"""`before_emit` may change or drop an event; if it fails, the event is dropped and counted."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from spool import Emitter
from spool.context import bind
from spool.testing import Recorder, record

USER, FAMILY = uuid.uuid4(), uuid.uuid4()


def emit(emitter: Emitter, **given: Any) -> str | None:
    return emitter.emit_event(event_type="seen", user_id=USER, family_unit_id=FAMILY, **given)


def test_it_changes_a_copy_of_the_event(emitter: Emitter, recorded: Recorder) -> None:
    def change(event: dict[str, Any]) -> dict[str, Any]:
        event["metadata"]["plan"] = "gold"
        event["metadata"].pop("note")
        event["event_type"] = "changed"
        return event

    emitter.before_emit = change
    metadata = {"note": "x", "password": "x"}
    assert emit(emitter, metadata=metadata, event_id=FAMILY) == str(FAMILY)
    (made,) = recorded.events
    assert (made["event_type"], made["metadata"]) == ("changed", {"password": "[redacted]", "plan": "gold"})
    assert metadata == {"note": "x", "password": "x"}


def test_it_sees_what_is_bound_and_may_remove_it(emitter: Emitter, recorded: Recorder) -> None:
    seen: list[dict[str, Any]] = []

    def anonymous(event: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(event))
        return {**event, "session_id": None, "metadata": {}}

    emitter.before_emit = anonymous
    with bind(user_id=USER, family_unit_id=FAMILY, session_id=USER, role="parent"):
        emitter.emit_event(event_type="seen", metadata={"a": 1})
    assert seen[0]["user_id"] == seen[0]["session_id"] == USER
    assert seen[0]["metadata"] == {"role": "parent", "a": 1}
    (made,) = recorded.events
    assert (made["user_id"], made["session_id"], made["metadata"]) == (str(USER), None, {})


@pytest.mark.parametrize("redact", [(), ("role",)])
def test_it_sees_the_defaults_and_what_it_makes_of_them_is_written(
    tmp_path: Path, redact: tuple[str, ...]
) -> None:
    seen: list[dict[str, Any]] = []

    def change(event: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(event["metadata"]))
        del event["metadata"]["service"]
        event["metadata"]["release"] = "none"
        return event

    emitter = Emitter(
        tmp_path, service="web", release="1.2", environment="test", before_emit=change, redact=redact
    )
    with record(emitter) as recorder:
        emit(emitter)
        with bind(user_id=USER, family_unit_id=FAMILY, extra={"plan": "pro"}):
            emitter.emit_event(event_type="seen", metadata={"service": "own"})
    defaults = {"release": "1.2", "environment": "test"}
    assert seen == [{"service": "web", **defaults}, {"service": "own", **defaults, "plan": "pro"}]
    first, second = (event["metadata"] for event in recorder.events)
    assert first == {"release": "none", "environment": "test"}
    assert second == {"release": "none", "environment": "test", "plan": "pro"}


def test_it_drops_an_event_and_the_drop_is_counted(emitter: Emitter) -> None:
    emitter.before_emit = lambda event: None if event["metadata"] == {"agent": "bot"} else event
    assert emit(emitter, metadata={"agent": "bot"}) is None
    assert emit(emitter) is not None
    assert emitter.stats().dropped == {"before_emit": 1}
    assert emitter.seal() and emitter.stats().emitted == 1


def fail(_: object) -> None:
    raise LookupError("oh")


@pytest.mark.parametrize(
    ("hook", "cause"),
    [
        (fail, "before_emit_failed"),
        (lambda: None, "before_emit_failed"),
        (lambda event: "text", "before_emit_failed"),
        (lambda event: {}, "before_emit_failed"),
        (lambda event: {**event, "user": 1}, "before_emit_failed"),
        (lambda event: {**event, "user_id": "nobody"}, "invalid_uuid"),
        (lambda event: {**event, "event_type": "No Name"}, "invalid_name"),
    ],
)
def test_what_goes_wrong_in_it_drops_and_counts_and_raises_only_when_strict(
    emitter: Emitter, hook: Any, cause: str
) -> None:
    emitter.before_emit = hook
    assert emit(emitter) is None
    assert emitter.stats().dropped == {cause: 1}
    with record(emitter), pytest.raises(ValueError, match=r"."):
        emit(emitter)


def test_a_key_that_is_misspelt_in_it_is_named(emitter: Emitter, recorded: Recorder) -> None:
    emitter.before_emit = lambda event: {**event, "user_ids": 1}
    with pytest.raises(ValueError, match='"user_ids"; did you mean "user_id"'):
        emit(emitter)


def test_what_it_emits_itself_does_not_go_through_it(emitter: Emitter, recorded: Recorder) -> None:
    def counting(event: dict[str, Any]) -> dict[str, Any]:
        emit(emitter, metadata={"from": "hook"})
        emitter.increment_counter(metric_name="hooked")
        return event

    emitter.before_emit = counting
    emit(emitter)
    assert [made["metadata"] for made in recorded.events] == [{"from": "hook"}, {}]


def test_what_a_signal_handler_raises_in_it_reaches_the_application(emitter: Emitter) -> None:
    def handler(*_: object) -> None:
        raise TimeoutError("time is up")

    def slow(event: dict[str, Any]) -> dict[str, Any]:
        signal.raise_signal(signal.SIGUSR1)
        return event

    emitter.before_emit = slow
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(TimeoutError, match="time is up"):
            emit(emitter)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert emitter.stats().dropped == {}


def test_it_is_given_at_construction_and_removed_later(tmp_path: Any) -> None:
    emitter = Emitter(tmp_path, before_emit=lambda event: None)
    assert emit(emitter) is None
    emitter.prepare()  # it runs the code of an emit
    emitter.before_emit = None
    assert emit(emitter) is not None
    emitter.close()
    assert emitter.stats().dropped == {"before_emit": 1}


def test_an_emitter_without_it_has_the_class_that_knows_nothing_of_it(emitter: Emitter) -> None:
    assert type(emitter) is Emitter
    with pytest.raises(TypeError, match="before_emit must be a function of an event, not int"):
        emitter.before_emit = 3  # type: ignore[assignment]  # like an application without a type checker
