"""Log records as events: the handler of `logging` and the processor of structlog."""

from __future__ import annotations

import io
import logging
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from spool import Emitter
from spool.context import bind
from spool.log_events import EventHandler, event_processor
from spool.testing import Recorder, record

USER = uuid.uuid4()


@pytest.fixture
def logger(request: pytest.FixtureRequest) -> Iterator[logging.Logger]:
    """Yield a separate logger at level INFO, without the root's handlers."""
    made = logging.getLogger(f"family.{request.node.name}")
    made.setLevel(logging.INFO)
    made.propagate = False
    yield made
    made.handlers.clear()


def test_a_record_with_the_key_is_an_event_and_the_others_are_not(
    emitter: Emitter, recorded: Recorder, logger: logging.Logger
) -> None:
    logger.addHandler(EventHandler(emitter=emitter))
    album = uuid.uuid4()
    with bind(user_id=USER, family_unit_id=USER, request_id="r1"):
        logger.info(
            "album %s was shared", album, extra={"analytics_event": "album_shared", "album_id": album}
        )
        logger.info("something else", extra={"album_id": album})
        logger.debug("below the level", extra={"analytics_event": "album_shared"})
        try:
            raise LookupError
        except LookupError:
            logger.exception(
                "failed", extra={"analytics_event": "album_failed", "family_unit_id": str(album)}
            )
    shared, failed = recorded.events
    assert (shared["event_type"], shared["user_id"]) == ("album_shared", str(USER))
    assert shared["metadata"] == {"album_id": str(album), "request_id": "r1"}
    assert (failed["event_type"], failed["family_unit_id"]) == ("album_failed", str(album))
    assert failed["metadata"] == {"request_id": "r1"}


def choose(entry: Any) -> Any:
    values = entry if isinstance(entry, dict) else vars(entry)
    match values.get("kind"):
        case "paid":
            return {
                "event_type": "order_paid",
                "user_id": USER,
                "family_unit_id": USER,
                "metadata": {"sum": values["sum"]},
            }
        case "fails":
            raise LookupError
        case "misspelt":
            return {"event": "order_paid"}
        case "text":
            return "order_paid"
    return None


def test_a_function_may_choose_and_what_it_gets_wrong_is_counted(
    emitter: Emitter, logger: logging.Logger
) -> None:
    logger.addHandler(EventHandler(emitter=emitter, choose=choose))
    with record(emitter, strict=False) as recorded:
        for kind in ("paid", "fails", "misspelt", "text", "none"):
            logger.info("x", extra={"kind": kind, "sum": 7})
    assert [(each["event_type"], each["metadata"]) for each in recorded.events] == [
        ("order_paid", {"sum": 7})
    ]
    assert sum(emitter.stats().dropped.values()) == 3
    with record(emitter), pytest.raises(ValueError, match="arguments"):
        logger.info("x", extra={"kind": "misspelt"})


def test_the_reports_of_the_package_are_never_events(emitter: Emitter, recorded: Recorder) -> None:
    handler = EventHandler(emitter=emitter, choose=lambda _: {"event_type": "logged"})
    handler.handle(logging.LogRecord("spool", logging.WARNING, "", 1, "dropped", (), None))
    assert not recorded.records


def test_a_structlog_entry_with_the_key_is_an_event_and_continues_without_it(
    emitter: Emitter, recorded: Recorder
) -> None:
    structlog = pytest.importorskip("structlog")
    out = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.PrintLogger(out),
        processors=[
            structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"),
            event_processor(emitter=emitter), structlog.processors.JSONRenderer(),
        ],
    )  # fmt: skip
    with bind(user_id=USER, family_unit_id=USER):
        logger.info("album shared", analytics_event="album_shared", album_id="a1")
        logger.info("something else", album_id="a2")
    (shared,) = recorded.events
    assert (shared["event_type"], shared["user_id"]) == ("album_shared", str(USER))
    assert shared["metadata"] == {"album_id": "a1"}
    first, second = out.getvalue().splitlines()
    assert "analytics_event" not in first
    assert '"album_id": "a1"' in first and '"album_id": "a2"' in second


def test_a_structlog_entry_may_be_chosen_by_a_function(emitter: Emitter, recorded: Recorder) -> None:
    process = event_processor(emitter=emitter, choose=choose)
    entry = {"event": "paid", "kind": "paid", "sum": 7}
    assert process(None, "info", dict(entry)) == entry
    assert recorded.events[0]["metadata"] == {"sum": 7}
