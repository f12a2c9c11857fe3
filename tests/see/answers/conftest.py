"""A database with two months of synthetic history, names with attacks, and rows loaded from a spool."""

from __future__ import annotations

import contextlib
import io
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.cli import main
from loader.demo import month
from loader.load import schema
from loader.load.database import Connection
from spool import Emitter
from tests.processes import LOADER, environment

HOSTILE = "</script><img src=x onerror=alert(1)>"
"""An event type that nobody may execute; the column takes any text."""
READER = "analytics_reader"


@dataclass(frozen=True)
class World:
    """A database with history."""

    dsn: str
    connection: Connection
    """The owner's, which commits by itself."""

    def number(self, statement: str, *values: object) -> int:
        ((found,),) = self.connection.execute(statement.encode(), values).fetchall()
        return int(found)


class Ended:
    """The output of a command."""

    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.code, self.out, self.err = process.returncode, process.stdout, process.stderr


@dataclass(frozen=True)
class Reader:
    """The command line as a read-only role."""

    world: World

    def __call__(self, *arguments: str | Path, code: int = 0, **variables: str) -> Ended:
        dsn = make_conninfo(self.world.dsn, user=READER)
        ended = subprocess.run(
            [*LOADER, *arguments],
            env=environment(LOADER_DSN=dsn, **variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return Ended(ended)

    def inside(self, *arguments: str | Path) -> Ended:
        """Run a command in this process, which is faster, for tests that do not depend on a terminal."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        words = [*map(str, arguments), "--dsn", make_conninfo(self.world.dsn, user=READER)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.cli.main(words, prog_name="loader")
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Ended(subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue()))


@pytest.fixture(scope="package")
def world(one_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    name = f"world_{uuid.uuid4().hex}"
    with psycopg.connect(one_server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    dsn = make_conninfo(one_server, dbname=name)
    with psycopg.connect(dsn) as connection:
        schema.apply_schema(connection, role="analytics_loader", reader=READER)
        connection.commit()
        connection.autocommit = True
        home = tmp_path_factory.mktemp("world")
        _load(dsn, home)
        _refresh(connection)
        _attack(connection)
        connection.execute("VACUUM ANALYZE")
        yield World(dsn, connection)


def _load(dsn: str, home: Path) -> None:
    """Load the history by backfill, and current lines from a spool; two are dropped and one is rejected."""
    history, spool = home / "history.ndjson", home / "spool"
    with history.open("wb") as file:
        file.writelines(month.lines(datetime.now(UTC), families=70, seed=7))
    spool.mkdir()
    emitter = Emitter(spool)
    for _ in range(20):
        emitter.emit_event(
            event_type="feed_viewed", user_id=uuid.uuid4(), family_unit_id=uuid.uuid4(), metadata={}
        )
    emitter.increment_counter(metric_name="spool_dropped_count", value=2, labels={"cause": "disk_full"})
    emitter.close()
    (spool / "wrong.ndjson").write_bytes(b"{broken\n")
    variables = environment(LOADER_DSN=dsn, SPOOL_DIR=str(spool))
    for command, code in (
        (["backfill", history], 0), (["run", "--once"], 0), (["backfill", spool / "wrong.ndjson"], 3),
    ):  # fmt: skip
        ended = subprocess.run([*LOADER, *command], env=variables, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr


def _attack(connection: Connection) -> None:
    """Insert rows with attacks as names, and two unusual hours, without the loader but with the required marks."""
    connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata) "
        "SELECT gen_random_uuid(), %s, now() - n * interval '20 minutes', md5('x')::uuid, md5('x')::uuid, "
        "jsonb_build_object('memory_id', %s::text) FROM generate_series(1, 2000) AS n",
        [HOSTILE, HOSTILE],
    )
    connection.execute(
        "INSERT INTO analytics_metrics (metric_name, metric_type, value, labels, timestamp) "
        "SELECT name, 'counter', 1, jsonb_build_object('endpoint', %s::text, 'method', 'GET', 'status', "
        "'200'), "
        "now() - interval '2 hours' FROM unnest(ARRAY['api_request_count', 'api_request_duration_ms']) AS "
        "name",
        [HOSTILE],
    )
    connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
        "SELECT gen_random_uuid(), %s, date_trunc('hour', now(), 'UTC') - interval '2 days' + n * interval '1 second', "
        "md5('x')::uuid, md5('x')::uuid FROM generate_series(1, 7199) AS n",
        [HOSTILE],
    )
    connection.execute(
        "INSERT INTO analytics_touched SELECT DISTINCT date_trunc('hour', timestamp, 'UTC'), 'events' FROM "
        "analytics_events "
        "WHERE event_type = %s UNION ALL SELECT date_trunc('hour', now() - interval '2 hours', 'UTC'), "
        "'metrics'",
        [HOSTILE],
    )


def _refresh(connection: Connection) -> None:
    done = 1
    while done:
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            ((done,),) = connection.execute("SELECT analytics_refresh()").fetchall()


@pytest.fixture
def reader(world: World) -> Reader:
    return Reader(world)
