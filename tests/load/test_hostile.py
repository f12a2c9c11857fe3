"""A spool directory with arbitrary entries: each entry that is not a segment is reported once and ignored."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from loader.files.retire import SpoolFile
from loader.load.database import Connection
from loader.load.schema import apply_schema
from tests.load.lines import STEM, event, joined, number, rejected, segment, wait_for_events
from tests.processes import HANGS_AFTER, LOADER, Cli, eventually, failing, needs_strace

MEMORY_KIB = 180 << 10
EVENTS = "SELECT count(*) FROM analytics_events"


def named(spool: Path, at: int) -> Path:
    return spool / f"{STEM.format(at)}.ndjson"


@contextmanager
def bound(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listening:
        directory = os.open(path.parent, os.O_RDONLY)  # the path of a socket may have only 107 bytes
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        yield


def test_what_is_no_segment_is_reported_once_and_the_rest_loads(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(joined(event(99)))
    named(cli.spool, 1).symlink_to(outside)
    os.mkfifo(named(cli.spool, 2))
    named(cli.spool, 3).mkdir()
    (cli.spool / ("x" * 240 + ".ndjson")).write_bytes(joined(event(98)))
    (cli.spool / "evil\n\x1b[31m.ndjson").write_bytes(joined(event(97)))
    with bound(named(cli.spool, 4)), cli.daemon() as process:
        for n in range(3):  # at least three scans of the directory
            segment(cli.spool, 10 + n, event(n))
            wait_for_events(one_connection, n + 1)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert log.count("skipped") == 6 and "\x1b" not in log
    assert outside.read_bytes() == joined(event(99))
    assert number(one_connection, EVENTS) == 3


def test_a_file_that_changes_while_it_is_read_stays_and_loads_the_next_time(
    one_connection: Connection, tmp_path: Path
) -> None:
    path = segment(tmp_path, 1, event(1))
    source = SpoolFile(path)
    with source.open() as stream:
        stream.read()
    with path.open("ab") as file:
        file.write(joined(event(2)))
    source.retire(oversize=False)
    assert path.exists() and not source.retired


@pytest.mark.long
def test_memory_is_bounded_for_a_file_of_nothing_but_tiny_rejects(cli: Cli) -> None:
    segment(cli.spool, 1, *[b"%x" % n for n in range(600_000)])
    # A child's peak begins with its parent's size (getrusage(2)), so a small parent asks.
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, *LOADER, "run", "--once"]
    peak = int(subprocess.check_output(command, env=cli.environment))
    assert peak < MEMORY_KIB
    assert sum(1 for _ in rejected(cli.spool)) == 600_000


@needs_strace
def test_a_file_without_read_permission_is_reported_and_the_rest_loads(
    cli: Cli, one_connection: Connection
) -> None:
    closed = segment(cli.spool, 1, event(1))
    segment(cli.spool, 2, event(2))
    command = [*failing("openat", "EACCES", "-P", closed), *LOADER, "run", "--once"]
    ended = subprocess.run(command, env=cli.environment, capture_output=True, text=True)
    assert ended.returncode == 1 and "could not be read: [Errno 13] Permission denied" in ended.stderr
    assert number(one_connection, EVENTS) == 1 and closed.exists()
    assert "Traceback" not in ended.stderr


@needs_strace
@pytest.mark.parametrize(("call", "error"), [("inotify_add_watch", "ENOSPC"), ("inotify_init1", "EMFILE")])
def test_without_inotify_the_daemon_looks_by_itself(
    cli: Cli, one_connection: Connection, call: str, error: str
) -> None:
    """With a limit of zero watches, or of zero instances (inotify_add_watch(2), inotify_init(2))."""
    command = [*failing(call, error), *LOADER, "run"]
    process = subprocess.Popen(command, env=cli.environment, stderr=subprocess.PIPE)
    try:
        for n in range(2):
            segment(cli.spool, n + 1, event(n))
            wait_for_events(one_connection, n + 1)
    finally:
        process.terminate()
        _, log = process.communicate(timeout=HANGS_AFTER)
    assert log.count(b"cannot watch") == 1


def test_an_outage_is_reported_once_and_its_end_too(cli: Cli, one_connection: Connection) -> None:
    name, dsn = one_connection.info.dbname, one_connection.info.dsn
    one_connection.close()
    with psycopg.connect(dsn, dbname="postgres", autocommit=True) as admin, cli.daemon() as process:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        for n in range(300):  # work for both workers
            segment(cli.spool, n + 1, event(n))
        assert process.stderr is not None
        reported = next(line for line in iter(process.stderr.readline, b"") if b"out of reach" in line)
        assert not select.select([process.stderr], [], [], 3)[0]  # several attempts without a message
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        eventually(lambda: not list(cli.spool.glob("2*")))
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert reported and rest.count(b"out of reach") == 0 and rest.count(b"loading continues") == 1
    with psycopg.connect(dsn) as again:
        assert number(again, EVENTS) == 300


@pytest.mark.parametrize(
    ("harm", "mend", "words"),
    [
        (
            "REVOKE INSERT ON analytics_events FROM {role}",
            "GRANT INSERT ON analytics_events TO {role}",
            "loader init --role",
        ),
        (
            "ALTER TABLE analytics_events RENAME TO gone",
            "ALTER TABLE gone RENAME TO analytics_events",
            "init",
        ),
        (
            "ALTER ROLE {role} SET default_transaction_read_only = on",
            "ALTER ROLE {role} RESET default_transaction_read_only",
            "read-only",
        ),
    ],
    ids=["permission", "table", "read-only"],
)
def test_a_configuration_error_keeps_the_spool_names_the_remedy_and_recovers(
    cli: Cli, one_connection: Connection, harm: str, mend: str, words: str
) -> None:
    role = "role_" + one_connection.info.dbname[-12:]
    apply_schema(one_connection, role=role)
    one_connection.execute(harm.format(role=role).encode())
    one_connection.commit()
    cli.environment["LOADER_DSN"] += f" user={role}"
    segment(cli.spool, 1, event(1))
    with cli.daemon() as process:
        assert process.stderr is not None
        log = iter(process.stderr.readline, b"")
        assert words in next(line for line in log if b"WARNING" in line).decode()
        assert list(cli.spool.glob("2*"))
        one_connection.execute(mend.format(role=role).encode())
        one_connection.commit()
        eventually(lambda: number(one_connection, EVENTS) == 1)
        eventually(lambda: not list(cli.spool.glob("2*")))
    assert not rejected(cli.spool)


@pytest.mark.long
def test_a_hundred_thousand_files(cli: Cli, one_connection: Connection) -> None:
    for n in range(100_000):
        segment(cli.spool, n + 1, event(n))
    printed = cli("run", "--once")
    assert re.search(r"files 100000, .*events 100000", printed)
    assert number(one_connection, EVENTS) == 100_000
    assert not list(cli.spool.glob("2*"))
