"""A row is there once, and a duplicate is silent only if it is equal."""

from __future__ import annotations

import orjson

from loader.database import EVENTS, METRICS, Connection, Inserted, apply_schema, insert
from loader.decode import Row, decode
from tests.load.test_decode import EVENT, METRIC


def event(number: int, title: str = "same") -> Row:
    event_id = f"0190163d-8694-739b-aea5-{number:012x}"
    row = decode(orjson.dumps(EVENT | {"event_id": event_id, "metadata": {"n": number, "title": title}}))
    assert isinstance(row, Row)
    return row


def count(connection: Connection, table: str) -> int:
    found = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert found is not None
    return int(found[0])


def test_the_schema_is_safe_to_apply_again(connection: Connection) -> None:
    apply_schema(connection)


def test_rows_that_are_loaded_twice_are_there_once(connection: Connection) -> None:
    rows = [event(n) for n in range(100)]
    assert insert(connection, EVENTS, rows[:60]) == Inserted()
    again = insert(connection, EVENTS, rows)
    assert (again.duplicates, again.collisions) == (list(range(60)), [])
    assert count(connection, "analytics_events") == 100


def test_the_same_id_with_another_payload_is_a_collision(connection: Connection) -> None:
    found = insert(connection, EVENTS, [event(1), event(2), event(1), event(1, "other")])
    assert found.duplicates == [2]
    assert [collision.position for collision in found.collisions] == [3]
    assert "same" in found.collisions[0].existing


def test_metrics_are_idempotent_on_their_event_id(connection: Connection) -> None:
    row = decode(orjson.dumps(METRIC))
    assert isinstance(row, Row)
    assert insert(connection, METRICS, [row]) == Inserted()
    assert insert(connection, METRICS, [row]).duplicates == [0]
