"""`loader migrate`: plain tables become partitions under a daemon and readers, also if it is killed at each step."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load.database import Connection
from spool.ids import uuid7
from tests.load.lines import event, metric, number, rows, segment, wait_for_events
from tests.processes import HANGS_AFTER, LOADER, Cli, slowness
from tests.servers import ROLE, database

FILL = """
    INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id)
    SELECT CASE WHEN n % 100 = 0 THEN gen_random_uuid() ELSE overlay(analytics_id_at(now() - n * interval '1 second')::text
        PLACING '7' || substr(gen_random_uuid()::text, 16) FROM 15)::uuid END,
        'kind_' || n % 10, now() - n * interval '1 second', gen_random_uuid(), gen_random_uuid()
    FROM generate_series(1, {0}) AS n;
    INSERT INTO analytics_metrics (id, metric_name, metric_type, value, timestamp)
    SELECT event_id, 'hits', 'counter', 1, timestamp FROM analytics_events
"""
LAYOUT = "SELECT value FROM analytics_settings WHERE name = 'layout'"
FILES = "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relname ~ '^analytics_(events|metrics)' AND relkind IN ('r', 'i')"
SLOWEST = 0.5
"""Seconds that a read may take on free processors."""


@pytest.fixture
def plain(one_server: str) -> Iterator[Connection]:
    """The owner's connection to a database with plain tables."""
    with database(one_server, template="plain") as dsn, psycopg.connect(dsn) as connection:
        yield connection


@pytest.fixture
def owner(plain: Connection, spool: Path) -> Cli:
    return Cli(spool, plain.info.dsn)


class Migration:
    """`loader migrate` as a process, whose lines are read one by one."""

    def __init__(self, cli: Cli) -> None:
        self.environment = cli.environment | {
            "LOADER_DSN": make_conninfo(cli.dsn, application_name="migration")
        }
        self.process = subprocess.Popen(
            [*LOADER, "migrate", "--to", "partitioned"], env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout.readline, "")

    def until(self, begins: str) -> bool:
        """Read to the line that begins so; False if it has ended without."""
        return any(line.startswith(begins) for line in self.lines)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def cut_off(self, connection: Connection) -> None:
        """End its server process; the command reports that, in one line."""
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'migration'"
        )
        connection.commit()
        _, errors = self.process.communicate(timeout=HANGS_AFTER)
        assert self.process.returncode in (0, 1, 4) and "Traceback" not in errors, errors

    def done(self) -> str:
        printed, errors = self.process.communicate(timeout=HANGS_AFTER)
        assert self.process.returncode == 0, printed + errors
        return printed


class Traffic:
    """Lines that are emitted: ids of now, some of version 4, and some of a clock that is a week ahead."""

    def __init__(self, spool: Path) -> None:
        self.events: set[str] = set()
        self.metrics: set[str] = set()
        self._spool = spool
        self._number = itertools.count(1)

    def emit(self) -> None:
        now = int(time.time() * 1000)
        ids = [uuid7(now) for _ in range(18)] + [str(uuid.uuid4()), uuid7(now + 7 * 86_400_000)]
        numbers = [uuid7(now) for _ in range(5)] + [str(uuid.uuid4())]
        lines = [event(n, event_id=each) for n, each in enumerate(ids)]
        lines += [metric(n, event_id=each) for n, each in enumerate(numbers)]
        path = segment(self._spool / "..", next(self._number), *lines)
        path.rename(self._spool / path.name)
        self.events.update(ids)
        self.metrics.update(numbers)


class Reads:
    """Counts all rows again and again: none disappears, and no read waits for long."""

    STATEMENTS = (
        "SELECT count(*) FROM analytics_events", "SELECT count(*) FROM analytics_metrics",
        "SELECT sum(events) FROM analytics_events_daily",
    )  # fmt: skip

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.slowest = 0.0
        self.lost: list[tuple[str, int, int]] = []
        self.done = threading.Event()

    def run(self) -> None:
        counts = dict.fromkeys(self.STATEMENTS, 0)
        with psycopg.connect(self._dsn, autocommit=True) as reader:
            reader.execute("SET statement_timeout = 0")
            while not self.done.is_set():
                for statement, before in counts.items():
                    begun = time.monotonic()
                    ((count,),) = reader.execute(statement.encode()).fetchall()
                    self.slowest = max(self.slowest, time.monotonic() - begun)
                    if count < before:
                        self.lost.append((statement, before, count))
                    counts[statement] = count


@contextmanager
def running(*work: Callable[[], object]) -> Iterator[None]:
    """Threads that run until their work has ended."""
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


STEPS = (
    "the tables and indexes", "building the unique index", "the cut is", "checking", "making analytics_events",
    "making analytics_metrics", "switching", "switched",
)  # fmt: skip


def killed_at_each_step(cli: Cli, connection: Connection, connections_too: bool) -> None:
    for step, line in enumerate(STEPS):
        for cut_off in (False, True) if connections_too else (bool(step % 2),):
            migration = Migration(cli)
            migration.until(line)  # it has ended if an earlier run did this step
            if cut_off:
                migration.cut_off(connection)
            else:
                migration.kill()


def check_under_load(connection: Connection, cli: Cli, count: int, connections_too: bool) -> None:
    owner = cli.owner()
    connection.execute(FILL.format(count).encode())
    connection.execute("ANALYZE analytics_events, analytics_metrics")
    connection.commit()
    files = dict(rows(connection, FILES))
    traffic, reads = Traffic(cli.spool), Reads(connection.info.dsn)

    def emit() -> None:
        while not reads.done.wait(0.05):  # so often a segment is sealed
            traffic.emit()

    with cli.daemon(), running(emit, reads.run):
        try:
            wait_for_events(connection, count + 100)
            killed_at_each_step(owner, connection, connections_too)
            printed = Migration(owner).done()
        finally:
            reads.done.set()
    assert "the tables are partitioned" in printed
    cli("run", "--once")  # what waited for the switch and is not due yet
    assert reads.lost == []
    assert reads.slowest < SLOWEST * slowness() + 0.5 * connections_too, reads.slowest
    for table, key, expected in (("events", "event_id", traffic.events), ("metrics", "id", traffic.metrics)):
        found = rows(
            connection,
            f"SELECT {key}::text FROM analytics_{table} WHERE {key}::text = ANY ('{{{','.join(expected)}}}')",
        )
        assert sorted(each for (each,) in found) == sorted(expected)
        assert number(connection, f"SELECT count(DISTINCT {key}) FROM analytics_{table}") == count + len(
            expected
        )
    assert number(connection, "SELECT sum(rejected) FROM analytics_loads") == 0
    assert_nothing_was_copied(connection, files)


def assert_nothing_was_copied(connection: Connection, before: dict[str, int]) -> None:
    """The tables and the indexes that still exist are in the files in which they were."""
    kept = {name for name in before if name not in ("analytics_events_pkey", "analytics_events_event_id_key")}
    after = set(dict(rows(connection, FILES)).values())
    assert {name for name in kept if before[name] not in after} == set()


def test_it_can_be_killed_at_each_step_under_a_daemon_and_a_reader(plain: Connection, spool: Path) -> None:
    cli = Cli(spool, make_conninfo(plain.info.dsn, user=ROLE))
    check_under_load(plain, cli, 5_000, connections_too=False)


@pytest.mark.long
def test_it_can_be_killed_at_each_step_with_millions_of_rows(server: str, spool: Path) -> None:
    with database(server, template="plain") as dsn, psycopg.connect(dsn) as connection:
        check_under_load(
            connection, Cli(spool, make_conninfo(dsn, user=ROLE)), 2_000_000, connections_too=True
        )
