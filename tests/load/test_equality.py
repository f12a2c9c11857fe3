"""Lines with one event_id are duplicates if the application's values are equal, whatever the emitter adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from loader.load.batch import load
from loader.load.counts import Counts
from loader.load.database import Connection
from spool import Emitter
from spool.context import bind
from tests.load.lines import EVENT, ID, METRIC, as_owner, chunk, event, metric, rejected, rows

WAYS = pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])
LATER = "2026-01-21T08:00:00.000001Z"
ADDED = {"request_id": "r1", "role": "parent", "service": "web", "release": "1.2", "environment": "test"}


@WAYS
def test_what_the_emitter_adds_does_not_count(
    connection: Connection, tmp_path: Path, duplicates: float
) -> None:
    same = [
        event(1, timestamp=LATER), event(1, metadata={"a": 1} | ADDED),
        event(1, metadata={"role": "child", "a": 1}), metric(1, timestamp=LATER), metric(1, labels=ADDED),
    ]  # fmt: skip
    load(connection, [chunk(event(1), metric(1), file="before")], tmp_path)
    assert load(connection, [chunk(*same)], tmp_path, duplicates).counts == Counts(duplicates=5)
    fresh = [line.replace(b"-00000000000", b"-10000000000") for line in same]
    assert load(connection, [chunk(*fresh)], tmp_path, duplicates).counts == Counts(1, 1, 3)


@WAYS
@pytest.mark.parametrize(
    "change",
    [
        {"event_type": "memory_viewed"}, {"user_id": ID[:-1] + "2"}, {"family_unit_id": ID[:-1] + "2"},
        {"session_id": ID}, {"metadata": {"a": 2}}, {"metadata": {"a": 1, "b": {"role": "x"}}},
        {"metadata": {"a": 1, "roles": 1}},
    ],
)  # fmt: skip
def test_what_the_application_gave_counts(
    one_connection: Connection, tmp_path: Path, change: dict[str, Any], duplicates: float
) -> None:
    load(one_connection, [chunk(event(1), event(2, metadata={"a": 1, "b": {"role": "y"}}))], tmp_path)
    assert load(one_connection, [chunk(event(1, **change))], tmp_path, duplicates).counts == Counts(
        rejected=1
    )
    assert {code for _, _, code in rejected(tmp_path)} == {"collision"}


def test_the_same_call_twice_with_the_callers_event_id_is_one_row(
    connection: Connection, tmp_path: Path
) -> None:
    for attempt in range(2):
        emitter = Emitter(tmp_path / "emitted")
        with bind(role="parent", request_id=f"request-{attempt}"):
            emitter.emit_event(
                event_type="invite_accepted", user_id=ID, family_unit_id=ID, event_id=ID, metadata={"n": 1}
            )
        emitter.close()
    segments = sorted((tmp_path / "emitted").glob("*.ndjson"))
    lines = [line for path in segments for line in path.read_bytes().splitlines()]
    assert load(connection, [chunk(*lines)], tmp_path).counts == Counts(events=1, duplicates=1)


# ---- rows that were exported ------------------------------------------------------------------------


def exported(connection: Connection) -> list[bytes]:
    """Return each row of the two tables as a JSON object."""
    return [
        orjson.dumps(row)
        for table in ("analytics_events", "analytics_metrics")
        for (row,) in rows(connection, f"SELECT row_to_json(t) FROM {table} AS t ORDER BY id")
    ]


def test_rows_that_were_exported_from_the_tables_are_loaded_as_they_were(
    connection: Connection, tmp_path: Path
) -> None:
    lines = [*map(event, range(20)), event(30, event_id="c56a4180-65aa-42ec-a945-5fd21dec0538"), metric(1)]
    load(connection, [chunk(*lines)], tmp_path)
    export = exported(connection)
    assert load(connection, [chunk(*export)], tmp_path).counts == Counts(duplicates=22)
    keys = "SELECT event_id FROM analytics_events UNION ALL SELECT id FROM analytics_metrics ORDER BY 1"
    before = rows(connection, keys)
    as_owner(connection, "TRUNCATE analytics_events, analytics_metrics, analytics_loads")
    assert load(connection, [chunk(*export)], tmp_path).counts == Counts(events=21, metrics=1)
    assert rows(connection, keys) == before


def test_an_id_without_an_event_id_is_that_of_a_metric_only(connection: Connection, tmp_path: Path) -> None:
    def without(record: dict[str, Any], **more: object) -> bytes:
        return orjson.dumps({key: value for key, value in record.items() if key != "event_id"} | more)

    lines = [
        without(METRIC, id=ID), without(METRIC, id=None), without(METRIC), without(METRIC, id=7),
        without(EVENT, id=ID), event(1, id=7, created_at=None), metric(2, id=ID, created_at="2026-01-01"),
    ]  # fmt: skip
    assert load(connection, [chunk(*lines)], tmp_path).counts == Counts(events=1, metrics=2, rejected=4)
    assert [code for _, _, code in rejected(tmp_path)] == [
        "missing_field", "missing_field", "invalid_uuid", "missing_field",
    ]  # fmt: skip
