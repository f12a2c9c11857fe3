"""A connection breaks at any byte before, during or after COMMIT: every line is stored once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import database
from loader.load.batch import load
from loader.load.database import Connection
from loader.load.sqlstate import Action, action, is_lost
from tests.load.lines import chunk, event, is_number, metric, number, rejected, rows, segment
from tests.processes import Cli, eventually
from tests.proxy import COMMIT, COPY_DONE, Proxy
from tests.servers import ROLE
from tests.thinned import one_in

EVENTS = "SELECT count(*) FROM analytics_events"
SENT = len(b"Q\0\0\0\x0b" + COMMIT)
ANSWER = len(b"C\0\0\0\x0bCOMMIT\0" + b"Z\0\0\0\5I")


@pytest.mark.parametrize("position", one_in(2, range(SENT + ANSWER + 1)))
def test_a_connection_that_is_cut_at_any_byte_of_a_commit_stores_each_line_once(
    connection: Connection, tmp_path: Path, position: int
) -> None:
    lines = chunk(*map(event, range(20)), metric(1), event(1), b"{broken")
    with Proxy.to(make_conninfo(connection.info.dsn, user=ROLE)) as proxy:
        wire = database.connect(proxy.dsn)
        proxy.cut_at_commit(position)
        try:
            load(wire, [lines], tmp_path)
            assert position >= SENT + ANSWER - len(b"Z\0\0\0\5I")  # it was answered
        except psycopg.Error as error:
            assert action(error.sqlstate) is Action.RETRY and is_lost(error)
        assert proxy.cuts == 1
        wire.close()
        eventually(lambda: not number(connection, WRITERS))
        committed = number(connection, EVENTS) == 20
        again = load(database.connect(proxy.dsn), [lines], tmp_path)
    assert again.known == (23 if committed else 0)
    assert committed or position < SENT
    assert rows(connection, "SELECT events, metrics, duplicates, rejected FROM analytics_loads") == [
        (20, 1, 1, 1)
    ]
    assert (number(connection, EVENTS), len(rejected(tmp_path))) == (20, 1)


WRITERS = (
    f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = '{ROLE}' "
    "AND pid <> pg_backend_pid()"
)


@pytest.mark.parametrize("position", range(12))
@pytest.mark.parametrize("duplicates", [0.0, 1.0], ids=["direct", "comparing"])
def test_a_connection_that_is_cut_at_the_end_of_a_copy_is_a_lost_connection(
    one_connection: Connection, tmp_path: Path, position: int, duplicates: float
) -> None:
    with Proxy.to(one_connection.info.dsn) as proxy:
        wire = database.connect(proxy.dsn)
        proxy.cut_at(COPY_DONE, position)
        with pytest.raises(psycopg.OperationalError) as raised:
            load(wire, [chunk(*map(event, range(2000)))], tmp_path, duplicates)
        assert action(raised.value.sqlstate) is Action.RETRY and is_lost(raised.value)
        wire.close()
    assert load(one_connection, [chunk(*map(event, range(2000)))], tmp_path).counts.events == 2000


def test_a_daemon_whose_commits_are_cut_one_after_the_other_stores_each_line_once(
    cli: Cli, one_connection: Connection
) -> None:
    with Proxy.to(cli.dsn) as proxy:
        cli.environment["LOADER_DSN"] = proxy.dsn
        with cli.daemon():
            for place, position in enumerate(
                (0, 5, SENT - 1, SENT, SENT + 1, SENT + ANSWER - 1, SENT + ANSWER)
            ):
                proxy.cut_at_commit(position)
                segment(cli.spool, place + 1, *[event(place * 10 + n) for n in range(10)])
                eventually(partial(is_number, one_connection, EVENTS, 10 * (place + 1)), 60)
                eventually(lambda: not list(cli.spool.glob("*.ndjson")), 60)
    assert number(one_connection, "SELECT sum(events) FROM analytics_loads") == 70
    assert proxy.cuts >= 7
