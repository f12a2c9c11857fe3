"""Prune continues after obstacles, and trusts only the server's clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from loader.load.database import Connection
from loader.operate import prune
from tests.load.lines import event, number, segment
from tests.processes import LOADER, Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"
OLD = "2020-01-01T00:00:00Z"
LONG_AGO = 1.5e9


def load_old_events(cli: Cli) -> None:
    segment(cli.spool, 1, *[event(n, timestamp=OLD) for n in range(20)])
    cli("run", "--once")


def test_a_deadlock_and_a_lock_that_takes_long_do_not_end_it(cli: Cli, one_connection: Connection) -> None:
    load_old_events(cli)
    lock_row = "SELECT FROM analytics_events WHERE event_id = '0190163d-8694-739b-aea5-{:012x}' FOR UPDATE"
    waits = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%prune_hour%'"
    )
    with psycopg.connect(one_connection.info.dsn) as other:
        other.execute("SET deadlock_timeout = '60s'")  # so that prune is the deadlock victim
        other.execute(lock_row.format(10).encode())
        pruning = subprocess.Popen(
            [*LOADER, "prune", "--older-than", "1d", "--json"],
            env=cli.owner().environment,
            stdout=subprocess.PIPE,
        )
        eventually(lambda: number(one_connection, waits))
        other.execute("UPDATE analytics_events SET metadata = '{}'")  # rows locked by prune
        assert pruning.poll() is None
    assert json.loads(pruning.communicate(timeout=60)[0])["events"] == 20
    assert number(one_connection, EVENTS) == 0


@pytest.mark.parametrize("name", ["20200101", "20200101.txt", "٢٠٢٠٠١٠١", "2020010\udcff"])
def test_a_file_in_the_archive_that_is_not_a_day_is_skipped(cli: Cli, tmp_path: Path, name: str) -> None:
    archive = tmp_path / "archive"
    (archive / "20200102").mkdir(parents=True)
    old = archive / "20200102" / "a.ndjson.zst"
    old.write_bytes(b"")
    (archive / name).write_bytes(b"mine")
    for path in (old, archive / name):
        os.utime(path, (LONG_AGO, LONG_AGO))
    printed = cli.owner()("prune", "--older-than", "1d", "--archive", archive)
    assert "archived files 1" in printed and not old.exists()
    assert (archive / name).read_bytes() == b"mine"
    assert ("20200101 is a file" in printed) == (name == "20200101")


def test_an_entry_that_cannot_be_removed_is_named_and_the_others_are_removed(
    cli: Cli, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    (archive / "20200102").mkdir(parents=True)
    (archive / "20200101").symlink_to(tmp_path)
    old = archive / "20200102" / "a.ndjson.zst"
    old.write_bytes(b"")
    os.utime(old, (LONG_AGO, LONG_AGO))
    printed = cli.owner()("prune", "--older-than", "1d", "--archive", archive, code=1)
    assert "20200101 is a link" in printed and "archived files 1" in printed and not old.exists()


def test_a_client_whose_clock_is_years_ahead_removes_nothing_that_is_new(
    cli: Cli, one_connection: Connection
) -> None:
    segment(cli.spool, 1, event(1, timestamp=datetime.now(UTC).isoformat()), b"{broken")
    cli("run", "--once", code=3)
    code = (
        "import datetime, sys\n"
        "class Ahead(datetime.datetime):\n"
        "    @classmethod\n"
        "    def now(cls, tz=None): return super().now(tz) + datetime.timedelta(days=3650)\n"
        "datetime.datetime = Ahead\n"
        "from loader.__main__ import main\nsys.argv[1:] = ['prune', '--older-than', '90d', '--json']\nmain()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=cli.owner().environment, capture_output=True, text=True
    )
    printed = json.loads(ended.stdout)
    assert (printed["events"], printed["rejected_files"]) == (0, 0)
    assert number(one_connection, EVENTS) == 1


def test_the_limit_is_that_of_the_server(one_connection: Connection) -> None:
    rows = prune.Rows(one_connection, timedelta(days=1), threading.Event())
    ((now,),) = one_connection.execute("SELECT now()").fetchall()
    assert abs(now - rows.before - timedelta(days=1)) < timedelta(seconds=60)
