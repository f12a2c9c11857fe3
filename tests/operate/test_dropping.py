"""Partitions of old ids are dropped: no answer changes, no session waits, and each drop is complete or undone."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyarrow.parquet as pq
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import partitions
from loader.load.database import Connection
from tests.load.lines import event, metric, number, rows, segment, waits_for_events
from tests.operate.test_expired import NOW, event_of, id_at, metric_of
from tests.processes import HANGS_AFTER, LOADER, Cli, eventually, slowness
from tests.servers import ROLE, database

EVENTS = "SELECT count(*) FROM analytics_events"
SPAN = "now() - interval '99 days', now() + interval '1 day'"
ANSWERS = (
    f"SELECT sum(events) FROM analytics_trend({SPAN})",
    f"SELECT sum(requests) FROM analytics_requests({SPAN}, 'day')",
    f"SELECT sum(dau) FROM analytics_active({SPAN})",
)
PARTITIONS = (
    "SELECT count(*) FROM analytics_time_partitions('events') WHERE until <= now() - interval '30 days'"
)
A_DAY = """
    INSERT INTO analytics_events (id, event_id, event_type, timestamp, user_id, family_unit_id)
    SELECT key, key, 'type_' || n %% 7, moment, users[1 + n %% 5], users[1 + n %% 5]
    FROM generate_series(1, %(rows)s::int) AS n
    CROSS JOIN (SELECT ARRAY(SELECT id FROM auth.users LIMIT 5) AS users) AS known
    CROSS JOIN LATERAL (
        SELECT date_trunc('day', now(), 'UTC') - make_interval(days => %(days)s) + n * interval '1 day' / (%(rows)s + 1)
    ) AS made (moment)
    CROSS JOIN LATERAL (SELECT (left(analytics_id_at(moment)::text, 14) || '7' || right(gen_random_uuid()::text, 21))::uuid)
        AS named (key)
"""


@pytest.fixture
def owner(one_server: str) -> Iterator[Connection]:
    """Partitioned tables with foreign keys, and partitions for some days."""
    with database(one_server, template="partitioned") as dsn, psycopg.connect(dsn) as connection:
        connection.execute(
            "CREATE SCHEMA auth; CREATE TABLE auth.users (id uuid PRIMARY KEY, name text); "
            "CREATE TABLE family_units (id uuid PRIMARY KEY)"
        )
        known = "SELECT '0190163d-8694-739b-aea5-966c26f8ad91'::uuid UNION ALL SELECT gen_random_uuid() FROM generate_series(1, 9)"
        connection.execute(
            f"INSERT INTO auth.users {known}; INSERT INTO family_units SELECT id FROM auth.users".encode()
        )
        connection.execute(
            f"GRANT USAGE ON SCHEMA auth TO {ROLE}; GRANT SELECT ON auth.users, family_units TO {ROLE}".encode()
        )
        connection.commit()
        for first, last in ((41, 35), (11, 9)):
            partitions.make(connection, NOW - timedelta(days=first), NOW - timedelta(days=last))
        yield connection
        connection.rollback()


@pytest.fixture
def loader(owner: Connection, spool: Path) -> Cli:
    cli = Cli(spool, make_conninfo(owner.info.dsn, user=ROLE))
    printed = cli.owner()("init", "--role", ROLE)
    assert "foreign key" in printed
    return cli


def counted(days: float, number: int) -> bytes:
    moment = NOW - timedelta(days=days)
    return metric(
        number, event_id=id_at(moment, number), timestamp=moment.isoformat(), metric_name="api_request_count", value=2,
        labels={"endpoint": "/", "method": "GET", "status": "200"},
    )  # fmt: skip


def load_days(cli: Cli) -> None:
    """Events and requests of 40 to 36 and of 10 days ago, one with a newer timestamp and one of an id without time."""
    lines = [event_of(days + n / 50, 100 * days + n) for days in (40, 38, 36, 10) for n in range(20)]
    lines += [counted(days + n / 50, 10_000 + 100 * days + n) for days in (40, 38, 10) for n in range(5)]
    old = NOW - timedelta(days=38)
    lines.append(event(1, event_id=id_at(old, 1), timestamp=(NOW - timedelta(days=2)).isoformat()))
    untimed = id_at(old, 2)[:14] + "4" + id_at(old, 2)[15:]
    lines.append(event(2, event_id=untimed, timestamp=(NOW - timedelta(days=3)).isoformat()))
    segment(cli.spool, 1, *lines)
    cli("run", "--once")


def answers(connection: Connection) -> list[object]:
    return [rows(connection, statement) for statement in ANSWERS]


def prune(cli: Cli, *arguments: str | Path) -> Any:
    return json.loads(cli.owner()("prune", "--older-than", "30d", "--json", *arguments))


@pytest.mark.parametrize("refreshed", [True, pytest.param(False, marks=pytest.mark.long)])
def test_dropping_partitions_changes_no_answer(loader: Cli, owner: Connection, *, refreshed: bool) -> None:
    load_days(loader)
    if refreshed:
        loader("rollup")
    before = answers(owner)
    expected = prune(loader, "--dry-run")
    assert expected["events"] == 62 and number(owner, EVENTS) == 82
    printed = prune(loader)
    assert (printed["events"], printed["metrics"]) == (61, 10)  # the id without a time stays
    dropped = {name: each for name, each in printed["partitions"].items() if each["rows"]}
    assert sum(each["rows"] for each in dropped.values()) == 71
    assert sum(each["newer"] for each in dropped.values()) == 2
    assert number(owner, PARTITIONS) == 0
    assert number(owner, EVENTS) == 21
    assert answers(owner) == before
    loader("rollup")
    assert answers(owner) == before
    assert prune(loader)["events"] == 0
    assert answers(owner) == before


def test_a_dropped_partition_was_exported(loader: Cli, owner: Connection, tmp_path: Path) -> None:
    load_days(loader)
    day = NOW - timedelta(days=38)
    file = tmp_path / "kept" / f"analytics_events_{day:%Y%m%d}.parquet"
    file.parent.mkdir()
    file.write_bytes(b"of an attempt that was cut off")
    held = f"SELECT event_id::text FROM analytics_events_{day:%Y%m%d} ORDER BY 1"
    ids = [found for (found,) in rows(owner, held)]
    printed = prune(loader, "--export", file.parent)
    exported = pq.read_table(file).column("event_id").to_pylist()
    assert len(ids) > 10 and sorted(exported) == ids
    names = {path.stem for path in file.parent.iterdir()}
    assert names == set(printed["partitions"])


def test_a_row_that_comes_after_the_export_is_not_lost(loader: Cli, owner: Connection) -> None:
    load_days(loader)
    day = f"analytics_events_{NOW - timedelta(days=38):%Y%m%d}"
    with pytest.raises(psycopg.errors.SerializationFailure, match="of which 3 were exported"):
        owner.execute(
            f"SELECT analytics_drop_partition('events', '{day}', now() - interval '30 days', 3)".encode()
        )
    owner.rollback()
    assert number(owner, EVENTS) == 82


def test_a_partition_that_is_new_or_none_is_refused(loader: Cli, owner: Connection) -> None:
    day = f"analytics_events_{NOW - timedelta(days=10):%Y%m%d}"
    for name, words in (
        (day, "not older"),
        ("analytics_events_default", "not a partition"),
        ("auth.users", "not a part"),
    ):
        with pytest.raises(psycopg.Error, match=words):
            owner.execute(
                f"SELECT analytics_drop_partition('events', '{name}', now() - interval '30 days')".encode()
            )
        owner.rollback()
    assert "permission denied" in loader("prune", "--older-than", "30d", code=1)


def test_prune_that_is_killed_between_rollup_and_drop_has_done_nothing(
    loader: Cli, owner: Connection
) -> None:
    load_days(loader)
    loader("rollup")
    before, partitions_before = answers(owner), number(owner, PARTITIONS)
    owner.execute("SELECT FROM analytics_events LIMIT 1")  # keeps the lock that DROP waits for
    with psycopg.connect(owner.info.dsn, autocommit=True) as watching:
        pruning = subprocess.Popen([*LOADER, "prune", "--older-than", "30d"], env=loader.owner().environment)
        eventually(lambda: waits_for_events(watching))
        pruning.kill()
        pruning.wait(HANGS_AFTER)
        owner.commit()
        eventually(
            lambda: (
                number(watching, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%drop_partition%'")
                <= 1
            )
        )
    assert answers(owner) == before
    assert number(owner, PARTITIONS) == partitions_before
    assert prune(loader)["events"] == 61
    assert answers(owner) == before


def test_a_long_transaction_on_the_applications_tables_is_not_waited_for(
    loader: Cli, owner: Connection
) -> None:
    load_days(loader)
    with psycopg.connect(owner.info.dsn) as application:
        application.execute(
            "UPDATE auth.users SET name = 'held'; INSERT INTO family_units VALUES (gen_random_uuid())"
        )
        assert prune(loader)["events"] == 61
    assert number(owner, PARTITIONS) == 0


class Watch:
    """Repeats a transaction in a thread, and records the longest duration."""

    def __init__(self, dsn: str, statement: str, stop: threading.Event) -> None:
        self.slowest = 0.0
        self.runs = 0
        self._stop = stop
        self._dsn, self._statement = dsn, statement
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self._stop.is_set():
                began = time.monotonic()
                connection.execute(self._statement.encode())
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.runs += 1
                self._stop.wait(0.01)

    def join(self) -> None:
        self._thread.join()


@contextlib.contextmanager
def watching(dsn: str, *statements: str) -> Iterator[list[Watch]]:
    stop = threading.Event()
    watches = [Watch(dsn, statement, stop) for statement in statements]
    try:
        yield watches
    finally:
        stop.set()
        for watch in watches:
            watch.join()


@pytest.mark.long
def test_ten_partitions_dropped_and_made_beside_everything_keep_nobody_waiting(
    loader: Cli, owner: Connection
) -> None:
    partitions.make(owner, NOW - timedelta(days=45), NOW - timedelta(days=30))
    for days in range(32, 45):
        owner.execute(A_DAY.encode(), {"days": days, "rows": 5_000})
    owner.execute("SELECT analytics_mark('events', now() - interval '50 days', now())")
    owner.commit()
    loader("rollup")
    before = number(owner, ANSWERS[0])
    read = "SELECT count(*) FROM analytics_events WHERE event_type = 'memory_posted' AND timestamp > now() - interval '1 hour'"
    users = (
        "SELECT count(*) FROM auth.users",
        "UPDATE auth.users SET name = 'x' WHERE id = (SELECT max(id::text)::uuid FROM auth.users)",
    )
    emitted = 0
    with psycopg.connect(owner.info.dsn) as application, loader.daemon() as daemon:
        application.execute(
            "SELECT FROM auth.users FOR KEY SHARE; INSERT INTO auth.users VALUES (gen_random_uuid(), 'held')"
        )
        with watching(owner.info.dsn, read, *users) as (reader, *on_users):
            pruning = subprocess.Popen(
                [*LOADER, "prune", "--events", "31d", "--json"],
                env=loader.owner().environment,
                stdout=subprocess.PIPE,
            )
            while pruning.poll() is None:
                emitted += 1
                lines = [event(n, event_id=str(uuid.uuid4()), timestamp=NOW.isoformat()) for n in range(2000)]
                segment(loader.spool, emitted, *lines)
                eventually(
                    lambda: len(list(loader.spool.glob("*.ndjson"))) < 20 or pruning.poll() is not None
                )
            printed = json.loads(pruning.communicate()[0])
            eventually(lambda: not list(loader.spool.glob("*.ndjson")))
        assert daemon.poll() is None
        application.rollback()
    partitions.make(owner, NOW - timedelta(days=44), NOW - timedelta(days=34))
    dropped = {name: each for name, each in printed["partitions"].items() if each["rows"]}
    print(f"{len(dropped)} partitions of {printed['events']} rows beside {2000 * emitted} lines in {reader.runs} reads; "
          f"slowest read {reader.slowest:.3f} s, slowest on auth.users {[round(each.slowest, 3) for each in on_users]}")  # fmt: skip
    assert len(dropped) >= 10
    assert number(owner, ANSWERS[0]) == before + 2000 * emitted
    assert number(owner, "SELECT sum(rejected) FROM analytics_loads") == 0
    assert reader.slowest <= 0.5 * slowness()
    assert max(each.slowest for each in on_users) <= 0.2 * slowness()
    segment(loader.spool, emitted + 1, event_of(40, 1), metric_of(40, 2))
    assert "events 0, metrics 1, duplicates 0, rejected 0, expired 1" in loader("run", "--once")
