"""The daemon as a separate process: nothing is lost or stored twice, and nothing stops it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from loader.extras import install_command
from loader.files import rejects
from loader.files.limits import CHUNK_BYTES
from loader.load.database import Connection
from loader.service.daemon import RESCAN_SECONDS
from tests.load.lines import (
    STEM,
    event,
    joined,
    ledger_agrees,
    metric,
    number,
    rejected,
    rows,
    segment,
    wait_for_events,
    waits_for_events,
)
from tests.processes import LOADER, Cli, eventually, slowness

EVENTS = "SELECT count(*) FROM analytics_events"


def sealed(spool: Path) -> list[Path]:
    return list(spool.glob("*.ndjson"))


def test_what_is_sealed_is_loaded_and_removed(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, *[event(n) for n in range(10)])
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) == 10)
        segment(cli.spool, 2, *[event(n) for n in range(10, 30)], metric(1))
        eventually(lambda: number(one_connection, EVENTS) == 30)
        eventually(lambda: not sealed(cli.spool))
    ledger_agrees(one_connection, cli.spool)


def test_what_is_sealed_during_a_load_is_loaded_right_after_it(cli: Cli, one_connection: Connection) -> None:
    with cli.daemon():
        segment(cli.spool, 1, event(1))
        eventually(lambda: number(one_connection, EVENTS) == 1)
        with one_connection.transaction():
            one_connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
            segment(cli.spool, 2, event(2))
            eventually(lambda: waits_for_events(one_connection))
            segment(cli.spool, 3, event(3))
        eventually(lambda: number(one_connection, EVENTS) == 3, RESCAN_SECONDS / 2 * slowness())


def test_a_recreated_spool_is_watched_like_the_old_one(cli: Cli, one_connection: Connection) -> None:
    with cli.daemon():
        segment(cli.spool, 1, event(1))
        eventually(lambda: number(one_connection, EVENTS) == 1)
        shutil.rmtree(cli.spool)
        cli.spool.mkdir()
        segment(cli.spool, 2, event(2))
        eventually(lambda: number(one_connection, EVENTS) == 2)
        segment(cli.spool, 3, event(3))
        eventually(lambda: number(one_connection, EVENTS) == 3, RESCAN_SECONDS / 2 * slowness())


def test_an_emitting_application_is_loaded_while_it_runs(cli: Cli, one_connection: Connection) -> None:
    code = (
        "import uuid\nfrom spool import get_emitter\nemitter, user = get_emitter(), uuid.uuid4()\n"
        "for n in range(5000): emitter.emit_event(event_type='tick', user_id=user, family_unit_id=user)\n"
        "input()"
    )
    with cli.daemon():
        application = subprocess.Popen(
            [sys.executable, "-c", code], env=cli.environment, stdin=subprocess.PIPE
        )
        eventually(lambda: number(one_connection, EVENTS) == 5000)
        application.communicate(b"\n")
    assert not sealed(cli.spool)


def test_segments_of_dead_writers_are_loaded_by_once(cli: Cli, one_connection: Connection) -> None:
    (cli.spool / f"{STEM.format(1)}.open").write_bytes(joined(event(1), event(2)) + b'{"cut' + b"\0" * 5000)
    assert "events 2" in cli("run", "--once")
    assert not list(cli.spool.glob("2*"))


def test_a_second_loader_reports_the_holder_of_the_directory(cli: Cli) -> None:
    with cli.daemon() as process:
        eventually(lambda: (cli.spool / ".loader.lock").exists())
        eventually(lambda: f"already has a loader: pid {process.pid}" in cli("run", "--once", code=1))
    cli("run", "--once")


@pytest.mark.parametrize("attempt", range(5))
def test_a_loader_that_is_killed_loses_and_repeats_nothing(
    cli: Cli, one_connection: Connection, attempt: int
) -> None:
    for n in range(40):
        segment(cli.spool, n + 1, *[event(n * 500 + i) for i in range(500)], b"{broken")
    for kill in range(3):
        with cli.daemon("--workers", "3") as process:
            wait_for_events(one_connection, kill * 4000 + attempt * 500)
            process.send_signal(signal.SIGKILL)
            process.wait()
    cli("run", "--once")
    cli("run", "--once")
    assert number(one_connection, EVENTS) == 20_000
    assert len(rejected(cli.spool)) == 40 and not sealed(cli.spool)
    ledger_agrees(one_connection, cli.spool)
    assert number(one_connection, "SELECT count(*) FROM analytics_missing_segments") == 0


def test_two_loaders_of_copies_at_once_load_each_row_once(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    for n in range(20):
        segment(cli.spool, n + 1, *[event(n * 300 + i) for i in range(300)])
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "joined.ndjson").write_bytes(b"".join(path.read_bytes() for path in sorted(sealed(cli.spool))))
    with cli.daemon():
        backfill = cli("backfill", copy)
    assert "rejected 0" in backfill
    cli("run", "--once")
    assert number(one_connection, EVENTS) == 6000
    assert (copy / "joined.ndjson").exists()


def test_nothing_that_lies_in_the_spool_stops_the_daemon(cli: Cli, one_connection: Connection) -> None:
    (cli.spool / f"{STEM.format(1)}.ndjson").mkdir()
    (cli.spool / f"{STEM.format(2)}.ndjson").symlink_to("/etc/passwd")
    os.mkfifo(cli.spool / f"{STEM.format(3)}.ndjson")
    (cli.spool / "notes.ndjson").write_text("mine")
    (cli.spool / f"{STEM.format(4)}.ndjson").write_bytes(b"\xff\0\n" * 100)
    (cli.spool / f"{STEM.format(5)}.ndjson").write_bytes(b"")
    segment(cli.spool, 6, event(1))
    printed = cli("run", "--once", code=3)
    assert "events 1" in printed and "notes.ndjson" in printed
    assert number(one_connection, EVENTS) == 1
    left = {path.name for path in cli.spool.glob("*.ndjson")}
    assert left == {"notes.ndjson", *(f"{STEM.format(n)}.ndjson" for n in (1, 2, 3))}


def test_a_line_longer_than_a_chunk_is_rejected_and_its_file_kept_whole(
    cli: Cli, one_connection: Connection
) -> None:
    huge = b'{"a":"' + b"x" * (2 * CHUNK_BYTES) + b'"}'
    path = segment(cli.spool, 1, event(1), huge, event(2))
    data = path.read_bytes()
    cli("run", "--once", code=3)
    assert number(one_connection, EVENTS) == 2
    assert [(line, code) for _, line, code in rejected(cli.spool)] == [(2, "oversize")]
    assert (cli.spool / rejects.DIRECTORY / f"{path.stem}.whole").read_bytes() == data


def test_an_outage_rejects_nothing_and_is_waited_out(cli: Cli, one_connection: Connection) -> None:
    name, dsn = one_connection.info.dbname, one_connection.info.dsn
    with psycopg.connect(dsn, dbname="postgres", autocommit=True) as admin, cli.daemon() as process:
        segment(cli.spool, 1, event(1))
        eventually(lambda: number(one_connection, EVENTS) == 1)
        one_connection.close()
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        segment(cli.spool, 2, event(2), event(3))
        assert process.stderr is not None  # it is a pipe
        assert any(b"out of reach" in line for line in process.stderr)
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        eventually(lambda: not sealed(cli.spool))
    with psycopg.connect(dsn) as again:
        assert number(again, EVENTS) == 3
    assert not rejects.files(cli.spool)


def test_the_daemon_waits_for_missing_tables_and_names_the_remedy(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute("DROP TABLE analytics_loads CASCADE")
    one_connection.commit()
    segment(cli.spool, 1, event(1))
    assert "run `loader init` first" in cli("run", "--once", code=1)
    with cli.daemon():
        cli.owner()("init", "--role", "analytics_loader")
        eventually(lambda: number(one_connection, EVENTS) == 1)
    assert not rejects.files(cli.spool)


def test_sigterm_in_the_middle_of_a_load_loses_nothing(cli: Cli, one_connection: Connection) -> None:
    for n in range(30):
        segment(cli.spool, n + 1, *[event(n * 1000 + i) for i in range(1000)])
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) > 0)
    cli("run", "--once")
    assert (
        number(one_connection, EVENTS)
        == 30_000
        == number(one_connection, "SELECT sum(events) FROM analytics_loads")
    )


def test_a_number_that_was_never_loaded_is_named(cli: Cli, one_connection: Connection) -> None:
    for n in (1, 2, 4):
        segment(cli.spool, n, event(n))
    cli("run", "--once")
    assert rows(one_connection, "SELECT number FROM analytics_missing_segments") == [(3,)]


def test_loader_in_an_environment_without_its_dependencies_reports_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('No module named click', name='click')")
    ended = subprocess.run(
        LOADER, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"click is not installed: {install_command('loader')}" in ended.stderr
