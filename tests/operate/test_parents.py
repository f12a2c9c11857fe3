"""An event whose user is committed later is loaded by the daemon itself, once."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from loader.files.claim import claimed
from loader.files.waiting import RETRIED_SECONDS
from loader.load.database import Connection
from tests.load.lines import ID, event, number, rejected, rows, segment
from tests.processes import LOADER, Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"
RETRIED = "SELECT events, duplicates, rejected FROM analytics_loads WHERE file LIKE 'rejected/%'"
OTHER = "0190163d-8694-739b-aea5-966c26f8ad92"


@pytest.fixture
def users(one_connection: Connection) -> Connection:
    one_connection.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY)")
    one_connection.execute(
        "ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES auth.users (id)"
    )
    one_connection.commit()
    return one_connection


def register(connection: Connection, user: str = ID) -> None:
    connection.execute("INSERT INTO auth.users VALUES (%s)", [user])
    connection.commit()


def test_events_of_a_user_who_is_committed_later_are_loaded(cli: Cli, users: Connection) -> None:
    segment(cli.spool, 1, event(1), event(2), event(3, user_id=OTHER), b"{broken")
    with cli.daemon():
        eventually(lambda: len(rejected(cli.spool)) == 4)
        status = json.loads(cli("status", "--json"))
        assert status["spool"]["waiting_for_parents"] == 3 and status["database"]["retried"] == 0
        register(users)
        eventually(lambda: number(users, EVENTS) == 2)
        eventually(lambda: len(rejected(cli.spool)) == 2)
        assert rows(users, RETRIED) == [(2, 0, 0)]
        register(users, OTHER)
        eventually(lambda: number(users, EVENTS) == 3)
        eventually(lambda: [code for _, _, code in rejected(cli.spool)] == ["invalid_json"])
    assert rows(users, RETRIED) == [(2, 0, 0), (1, 0, 0)]
    status = json.loads(cli("status", "--json"))
    assert status["spool"]["waiting_for_parents"] == 0 and status["database"]["retried"] == 3


def test_a_restarted_daemon_continues_to_retry(cli: Cli, users: Connection) -> None:
    segment(cli.spool, 1, event(1))
    cli("run", "--once", code=3)
    register(users)
    with cli.daemon():
        eventually(lambda: number(users, EVENTS) == 1 and not rejected(cli.spool))


def test_rejects_of_an_hour_ago_are_left_to_a_person(cli: Cli, users: Connection) -> None:
    for n in (1, 2):
        segment(cli.spool, n, event(n))
    cli("run", "--once", code=3)
    old, _ = sorted((cli.spool / "rejected").iterdir())
    os.utime(old, (time.time() - RETRIED_SECONDS - 1,) * 2)
    register(users)
    with cli.daemon():
        eventually(lambda: number(users, EVENTS) == 1)
    assert old.exists()
    assert "events 1" in cli("rejects", "retry")


def test_retries_by_hand_and_by_the_daemon_at_once_load_each_line_once(cli: Cli, users: Connection) -> None:
    for n in range(20):
        segment(cli.spool, n + 1, *[event(100 * n + i) for i in range(20)])
    cli("run", "--once", code=3)
    register(users)
    command = [*LOADER, "rejects", "retry", "--json"]
    with cli.daemon():
        retrying = [subprocess.Popen(command, env=cli.environment, stdout=subprocess.PIPE) for _ in range(3)]
        printed = [json.loads(process.communicate(timeout=60)[0]) for process in retrying]
        eventually(lambda: not rejected(cli.spool))
    assert [process.returncode for process in retrying] == [0, 0, 0], printed
    assert number(users, EVENTS) == 400
    assert number(users, "SELECT sum(events) FROM analytics_loads") == 400
    assert number(users, "SELECT sum(duplicates) FROM analytics_loads") == 0
    assert rows(users, RETRIED) == [(20, 0, 0)] * 20


def test_a_file_is_claimed_once_and_not_after_it_was_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "a.ndjson", tmp_path / "b.ndjson"
    path.touch()
    with claimed(path) as first, claimed(path) as second:
        assert (first, second) == (True, False)
        other.touch()
        other.rename(path)
        with claimed(path) as third:
            assert third
    path.unlink()
    with claimed(path) as gone:
        assert not gone
