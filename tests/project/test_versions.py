"""Releases meet on every host that is upgraded: emitters, loaders and tables of two of them work together."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
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
for number in itertools.count():
    made = emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user, metadata={"n": number})
    print(made, flush=True)
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
    """The command line, with tables that the old release made."""
    with database(one_server, template="template0") as dsn:
        old.loader(Cli(spool, dsn), "init", "--role", ROLE)
        yield Cli(spool, make_conninfo(dsn, user=ROLE))


def test_what_an_old_emitter_left_is_loaded_once(old: Release, cli: Cli, one_connection: Connection) -> None:
    command = old.python("-c", EMITTER)
    with subprocess.Popen(command, env=cli.environment, stdout=subprocess.PIPE, text=True) as emitter:
        assert emitter.stdout is not None
        acknowledged = [emitter.stdout.readline().strip() for _ in range(1000)]
        emitter.kill()
    assert list(cli.spool.glob("*.open"))  # which the new loader seals
    assert "duplicates 0, rejected 0" in cli("run", "--once")
    found = {str(id_) for (id_,) in rows(one_connection, "SELECT event_id FROM analytics_events")}
    assert set(acknowledged) <= found
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


def test_an_upgrade_under_load_loses_and_repeats_nothing(
    old: Release, old_tables: Cli, tmp_path: Path
) -> None:
    command, printed = old.python("-c", EMITTER), tmp_path / "printed"
    with (
        psycopg.connect(old_tables.owner().dsn, autocommit=True) as connection,
        printed.open("w") as file,  # a pipe that nobody reads would stop the emitter after 1,771 events
        subprocess.Popen(command, env=old_tables.environment, stdout=file) as emitter,
    ):

        def load_some_more() -> None:
            wanted = number(connection, EVENTS) + 300
            eventually(lambda: number(connection, EVENTS) >= wanted)

        with old.daemon(old_tables):
            load_some_more()
            old_tables.owner()("init", "--role", ROLE)
            load_some_more()
        with old_tables.daemon():
            load_some_more()
            emitter.kill()
            emitter.wait()
            acknowledged = printed.read_text().split()
            eventually(lambda: not list(old_tables.spool.glob("2*")))
        found = [str(id_) for (id_,) in rows(connection, "SELECT event_id FROM analytics_events")]
        assert set(acknowledged) <= set(found)
        assert number(connection, MISSING) == number(connection, NO_WRITER) == 0
        ledger_agrees(connection, old_tables.spool)
