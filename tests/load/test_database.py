"""A row is stored once, and a duplicate is accepted silently only if it is equal."""

from __future__ import annotations

import psycopg

from loader.load.database import Connection, prepare
from loader.load.decode import Row, decode
from loader.load.schema import apply_schema
from loader.load.sqlstate import explain
from loader.load.staging import insert_staged
from loader.load.tables import EVENTS, METRICS
from tests.load import lines


def event(number: int, title: str = "same") -> Row:
    row = decode(lines.event(number, metadata={"title": title}))
    assert isinstance(row, Row)
    return row


def test_the_schema_is_safe_to_apply_again(connection: Connection) -> None:
    connection.execute("RESET ROLE")
    apply_schema(connection)


def test_a_lock_that_is_held_for_long_is_reported(connection: Connection) -> None:
    with connection.transaction():
        prepare(connection)
        assert connection.execute("SHOW lock_timeout").fetchone() == ("1min",)
    reason = explain(psycopg.errors.LockNotAvailable("canceling statement due to lock timeout"))
    assert (reason.exit_code, str(reason)) == (
        4,
        "the database cannot load at the moment: canceling statement due to lock timeout",
    )


def test_rows_that_are_loaded_twice_are_there_once(connection: Connection) -> None:
    rows = [event(n) for n in range(100)]
    assert insert_staged(connection, EVENTS, rows[:60]).positions() == set()
    again = insert_staged(connection, EVENTS, rows)
    assert (again.duplicates, again.collisions) == (list(range(60)), [])
    assert lines.number(connection, "SELECT count(*) FROM analytics_events") == 100


def test_the_same_id_with_another_payload_is_a_collision(connection: Connection) -> None:
    found = insert_staged(connection, EVENTS, [event(1), event(2), event(1), event(1, "other")])
    assert found.duplicates == [2]
    assert [collision.position for collision in found.collisions] == [3]
    assert "same" in found.collisions[0].existing


def test_metrics_are_idempotent_on_their_event_id(connection: Connection) -> None:
    row = decode(lines.metric(1))
    assert isinstance(row, Row)
    assert insert_staged(connection, METRICS, [row]).positions() == set()
    assert insert_staged(connection, METRICS, [row]).duplicates == [0]
