"""Findings of doctor about the layout, each caused by a real condition, with the role of the loader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.demo import embedded
from loader.load import partitions, schema
from loader.load.database import Connection
from loader.operate import migrate
from spool.ids import uuid7
from tests.load.lines import event as event_line
from tests.load.lines import rows, segment
from tests.operate.test_migrate import FILL
from tests.processes import Cli
from tests.servers import ROLE, database

INSERT = (
    "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
    "SELECT {}, 'x', now(), gen_random_uuid(), gen_random_uuid() FROM generate_series(1, {}) AS n"
)


@pytest.fixture
def partitioned(one_server: str) -> Iterator[Connection]:
    with database(one_server, template="partitioned") as dsn, psycopg.connect(dsn) as connection:
        yield connection


def examined(connection: Connection, spool: Path, code: int | None = None) -> list[dict[str, str]]:
    connection.commit()
    cli = Cli(spool, make_conninfo(connection.info.dsn, user=ROLE))
    found = json.loads(cli("doctor", "--json", code=code).splitlines()[0])
    assert not [each for each in found if each["check"] == "connection" and each["verdict"] == "failed"], (
        found
    )
    return [each for each in found if each["verdict"] != "ok"]


def later(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def without_partitions(connection: Connection, since: float, until: float) -> None:
    """Drop the partitions that begin between two numbers of days from now."""
    found = rows(
        connection,
        "SELECT partition::text, analytics_id_time(low) FROM (VALUES ('events'), ('metrics')) AS of (name), "
        "analytics_partitions(of.name) WHERE low > '016f5e66-e800-0000-0000-000000000000' AND high IS NOT NULL",
    )
    for name, begins in found:
        if later(since) < begins < later(until):
            connection.execute(f"DROP TABLE {name}".encode())


def short_runway(connection: Connection) -> None:
    without_partitions(connection, 2, 30)


def no_runway(connection: Connection) -> None:
    without_partitions(connection, -3, 30)


def gap_in_the_runway(connection: Connection) -> None:
    without_partitions(connection, 1, 2.5)


def runway_without_the_right(connection: Connection) -> None:
    short_runway(connection)
    connection.execute(f"REVOKE EXECUTE ON FUNCTION analytics_make_partitions FROM {ROLE}".encode())


def rows_in_default(connection: Connection) -> None:
    key = uuid7(int(later(100).timestamp() * 1000))
    connection.execute(INSERT.format(f"'{key}'::uuid", 1).encode())


def many_in_default(connection: Connection) -> None:
    key = f"overlay('{uuid7(int(later(100).timestamp() * 1000))}' PLACING lpad(to_hex(n), 8, '0') FROM 29)::uuid"
    connection.execute(INSERT.format(key, 10_001).encode())


def random_ids(connection: Connection) -> None:
    connection.execute(INSERT.format("gen_random_uuid()", 500).encode())


def unvacuumed_partition(connection: Connection) -> None:
    connection.execute("ALTER TABLE analytics_events_other SET (autovacuum_enabled = off)")


def touched_hours(connection: Connection) -> None:
    connection.execute(
        "INSERT INTO analytics_touched VALUES (date_trunc('hour', now()) - interval '5 hours', 'events')"
    )
    connection.commit()
    connection.execute(
        "INSERT INTO analytics_loads VALUES ('x', 'f', 0, 0, 0, 0, 0, 0, 0, 'h', now() - interval '20 minutes')"
    )


@pytest.mark.parametrize(
    ("harm", "check", "verdict", "words"),
    [
        (short_runway, "runway", "warning", "`loader init` creates them now"),
        (gap_in_the_runway, "runway", "warning", "has partitions until"),
        (no_runway, "runway", "failed", "no partition for the current time"),
        (runway_without_the_right, "runway", "warning", f"`loader init --role {ROLE}`"),
        (rows_in_default, "default", "warning", "1 rows of analytics_events are in the default partition"),
        (many_in_default, "default", "failed", "more than 10000 rows of analytics_events"),
        (random_ids, "ids", "warning", "of analytics_events has ids that are not UUIDv7"),
        (unvacuumed_partition, "autovacuum", "warning", "ALTER TABLE analytics_events_other RESET"),
        (touched_hours, "rollups", "warning", "`loader rollup`"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_with_partitions_is_found(
    partitioned: Connection,
    spool: Path,
    harm: Callable[[Connection], None],
    check: str,
    verdict: str,
    words: str,
) -> None:
    harm(partitioned)
    found = [each for each in examined(partitioned, spool) if each["check"] == check]
    assert found and {each["verdict"] for each in found} == {verdict}, found
    assert any(words in each["finding"] + each["remedy"] for each in found), found


def test_nothing_is_wrong_with_new_partitions(partitioned: Connection, spool: Path) -> None:
    checks = {each["check"] for each in examined(partitioned, spool)}
    assert not checks & {"layout", "runway", "default", "ids", "locks", "autovacuum", "rollups"}


def test_what_a_refresh_will_compute_soon_is_not_found(partitioned: Connection, spool: Path) -> None:
    """Marks of a load that has just been committed, also of hours long ago."""
    touched_hours(partitioned)
    partitioned.execute("DELETE FROM analytics_touched")
    partitioned.commit()
    partitioned.execute("INSERT INTO analytics_touched VALUES (now() - interval '5 hours', 'events')")
    assert "rollups" not in {each["check"] for each in examined(partitioned, spool)}


def test_a_migration_that_has_not_finished_is_found(one_server: str, spool: Path) -> None:
    with database(one_server, template="plain") as dsn, psycopg.connect(dsn) as connection:
        connection.execute(
            f"ALTER TABLE analytics_events ADD CONSTRAINT analytics_events_until CHECK (event_id < '{partitions.id_at(later(3))}')".encode()
        )
        (found,) = [each for each in examined(connection, spool) if each["check"] == "layout"]
        assert found["verdict"] == "warning" and "`loader migrate --to partitioned`" in found["remedy"]


@pytest.mark.long
def test_a_small_server_has_a_plain_table_that_outgrows_its_cache_and_too_few_locks(spool: Path) -> None:
    settings = ("shared_buffers=1MB", "max_locks_per_transaction=10", "max_connections=12")
    options = [part for option in settings for part in ("-c", option)]
    with embedded.server(18, *options) as dsn, psycopg.connect(dsn) as connection:
        schema.apply_schema(connection, role=ROLE)
        assert "layout" not in {each["check"] for each in examined(connection, spool)}
        connection.execute(FILL.format(20_000).encode())
        (found,) = [each for each in examined(connection, spool) if each["check"] == "layout"]
        assert found["verdict"] == "warning" and "`loader migrate --to partitioned`" in found["remedy"]
        migrate.migrate(connection, lambda _: None)
        partitions.make(connection, later(-20), later(0))
        found_after = examined(connection, spool)
        assert "layout" not in {each["check"] for each in found_after}
        (locks,) = [each for each in found_after if each["check"] == "locks"]
        assert locks["verdict"] == "warning" and "max_locks_per_transaction = " in locks["remedy"]


OLDER = {
    "version 4": "DELETE FROM analytics_schema WHERE version > 4; DROP FUNCTION analytics_make_partitions, analytics_partitions CASCADE",
    "version 2": "DELETE FROM analytics_schema; INSERT INTO analytics_schema VALUES (2); "
    "DROP TABLE analytics_touched, analytics_sealed CASCADE",
    "few rights": "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM analytics_loader; "
    "GRANT SELECT ON analytics_schema, analytics_loads TO analytics_loader",
}  # fmt: skip


@pytest.mark.parametrize("case", OLDER)
@pytest.mark.parametrize("layout", ["plain", "partitioned"])
def test_older_tables_and_few_rights_do_not_end_it(
    one_server: str, spool: Path, layout: str, case: str
) -> None:
    with database(one_server, template=layout) as dsn, psycopg.connect(dsn) as connection:
        connection.execute(OLDER[case].encode())
        segment(spool, 1, event_line(1))
        found = examined(connection, spool)
        assert {each["check"] for each in found if each["verdict"] == "failed"} <= {
            "privileges",
            "connection",
        }, found
