"""During an upgrade, emitters, loaders and tables of two releases work together."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load.database import Connection
from spool import Emitter
from tests import release
from tests.emit.lines import emit
from tests.load.lines import event, ledger_agrees, metric, number, rows, segment
from tests.processes import Cli, eventually
from tests.release import Release
from tests.servers import ROLE, database

RELEASES = {"0.1.0": "fbaceff9cb01a22e6c6928266c04cc36c13d4713"}
"""Earlier releases, by the commit that each was built from."""
EVENTS = "SELECT count(*) FROM analytics_events"
MISSING = "SELECT count(*) FROM analytics_missing_segments"
NO_WRITER = "SELECT count(*) FROM analytics_loads WHERE writer IS NULL OR segment IS NULL"
EMITTER = """
import itertools, sys, time, uuid
from spool import get_emitter
emitter, user = get_emitter(), uuid.uuid4()
acknowledged = open(sys.argv[1], "w", buffering=1)
for number in itertools.count():
    made = emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user, metadata={"n": number})
    print(made, file=acknowledged)
    emitter.increment_counter(metric_name="ticks")
    if number % 100 == 0:
        emitter.seal()
    time.sleep(0.001)  # some 1,000 events a second, not as many as possible
"""


@pytest.fixture(scope="session", params=RELEASES)
def old(request: pytest.FixtureRequest) -> Release:
    commit = RELEASES[request.param]
    if not release.exists(commit):
        pytest.skip(f"commit {commit} of release {request.param} is not in this repository")
    return release.install(commit, request.config.cache.mkdir("releases"))


@pytest.fixture
def old_tables(old: Release, one_server: str, spool: Path) -> Iterator[Cli]:
    """Return the command line, with tables created by the old release."""
    with database(one_server, template="template0") as dsn:
        old.loader(Cli(spool, dsn), "init", "--role", ROLE)
        yield Cli(spool, make_conninfo(dsn, user=ROLE))


@contextmanager
def emitting(old: Release, cli: Cli) -> Iterator[Path]:
    """Run an emitter of the old release, killed at the end; yield the file with its returned ids."""
    acknowledged = cli.spool.parent / "acknowledged"
    with subprocess.Popen(old.python("-c", EMITTER, acknowledged), env=cli.environment) as emitter:
        try:
            yield acknowledged
        finally:
            emitter.kill()


def ids(acknowledged: Path) -> set[str]:
    return set(acknowledged.read_text().split()) if acknowledged.exists() else set()


def test_what_an_old_emitter_left_is_loaded_once(old: Release, cli: Cli, one_connection: Connection) -> None:
    with emitting(old, cli) as acknowledged:
        eventually(lambda: len(ids(acknowledged)) >= 1000)
    assert list(cli.spool.glob("*.open"))  # the new loader seals it
    assert "duplicates 0, rejected 0" in cli("run", "--once")
    found = {str(id_) for (id_,) in rows(one_connection, "SELECT event_id FROM analytics_events")}
    assert ids(acknowledged) <= found
    assert number(one_connection, MISSING) == number(one_connection, NO_WRITER) == 0
    ledger_agrees(one_connection, cli.spool)


def test_an_old_loader_loads_into_new_tables(old: Release, cli: Cli, one_connection: Connection) -> None:
    emitter = Emitter(cli.spool)
    emitted = [emit(emitter, n=n) for n in range(100)]
    emitter.close()
    segment(cli.spool, 1, event(1), event(1), metric(1), metric(1), b"{broken")
    old.loader(cli, "run", "--once", code=3)
    segment(cli.spool, 2, event(1), event(2), metric(2))
    old.loader(cli, "run", "--once")
    assert number(one_connection, EVENTS) == len(emitted) + 2
    counts = "SELECT sum(events), sum(metrics), sum(duplicates), sum(rejected) FROM analytics_loads"
    assert rows(one_connection, counts) == [(len(emitted) + 2, 2, 3, 1)]
    assert number(one_connection, MISSING) == number(one_connection, NO_WRITER) == 0
    ledger_agrees(one_connection, cli.spool)


def test_a_new_loader_loads_into_old_tables_and_names_the_remedy(old: Release, old_tables: Cli) -> None:
    segment(old_tables.spool, 1, event(1), event(1), b"{broken")
    assert "run `loader init`" in old_tables("run", "--once", code=3)
    assert "upgraded from version 2" in old_tables.owner()("init", "--role", ROLE)
    segment(old_tables.spool, 2, event(1), event(2))
    assert "loader init" not in old_tables("run", "--once")
    with psycopg.connect(old_tables.owner().dsn) as connection:
        assert number(connection, EVENTS) == 2
        assert number(connection, MISSING) == number(connection, NO_WRITER) == 0
        ledger_agrees(connection, old_tables.spool)


def test_an_upgrade_under_load_loses_and_repeats_nothing(old: Release, old_tables: Cli) -> None:
    with psycopg.connect(old_tables.owner().dsn, autocommit=True) as connection:

        def load_some_more() -> None:
            wanted = number(connection, EVENTS) + 300
            eventually(lambda: number(connection, EVENTS) >= wanted)

        with emitting(old, old_tables) as acknowledged:
            with old.daemon(old_tables):
                load_some_more()
                old_tables.owner()("init", "--role", ROLE)
                load_some_more()
            with old_tables.daemon():
                load_some_more()
        old_tables("run", "--once")
        found = {str(id_) for (id_,) in rows(connection, "SELECT event_id FROM analytics_events")}
        assert ids(acknowledged) <= found
        assert number(connection, MISSING) == number(connection, NO_WRITER) == 0
        ledger_agrees(connection, old_tables.spool)
