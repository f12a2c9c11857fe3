"""A reject is bounded by its line, its file belongs to one chunk, and the commands read what was written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.files import rejects
from loader.files.limits import CHUNK_BYTES
from loader.files.rejects import Rejected
from loader.load import database
from loader.load.batch import load, retry
from loader.load.counts import Counts
from loader.load.database import Connection
from tests.load.lines import ID, as_owner, chunk, event, joined, number, rejected, rows, segment
from tests.processes import LOADER, Cli, eventually
from tests.servers import ROLE

EVENTS = "SELECT count(*) FROM analytics_events"
EXISTING = f"event_id {ID[:24]}"


def test_a_collision_names_both_and_does_not_repeat_the_stored_row(
    connection: Connection, tmp_path: Path
) -> None:
    load(connection, [chunk(event(1, metadata={"big": "x" * 1_000_000}))], tmp_path)
    lines = [event(1, metadata={"n": n}) for n in range(50)]
    assert load(connection, [chunk(*lines)], tmp_path).counts.rejected == 50
    (path,) = rejects.files(tmp_path)
    assert path.stat().st_size < 50 * 1500
    for each, line in zip(rejects.read(path), lines, strict=True):
        assert (
            each.raw == line and EXISTING in each.reason and '{"big": "xxx' in each.reason.replace('""', '"')
        )


def test_every_reason_is_bounded(tmp_path: Path) -> None:
    line = Rejected("a", 1, "code", "é" * 1_000_000, b"raw").encode()
    assert len(line) < 1200 and rejects.decode(line).reason.endswith("...")


def test_a_line_of_control_characters_as_long_as_a_chunk_can_be_read_again(
    cli: Cli, one_connection: Connection
) -> None:
    """Each of its bytes takes six bytes in a reject file."""
    line = b"\x01" * (CHUNK_BYTES - 2)
    segment(cli.spool, 1, line, event(1))
    cli("run", "--once", code=3)
    assert [each.raw for path in rejects.files(cli.spool) for each in rejects.read(path)] == [line]
    for command in ("rejects list", "rejects show", "status"):
        cli(*command.split())
    cli("doctor", code=None)


@pytest.mark.long
def test_a_reject_file_larger_than_a_gibibyte_is_read(tmp_path: Path, cli: Cli) -> None:
    """Older loaders wrote such files."""
    (cli.spool / "rejected").mkdir()
    line = Rejected("a", 1, "collision", "r", b"x" * 30_000_000).encode()
    with (cli.spool / "rejected" / "a-0.ndjson").open("wb") as file:
        for _ in range(40):
            file.write(line)
    assert json.loads(cli("rejects", "list", "--json"))["lines"] == 40
    assert '"collision": 40' in cli("status", "--json")


def test_files_of_one_base_name_keep_their_own_rejects(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    for day in range(1, 4):
        (tmp_path / "archive" / f"2026-01-0{day}").mkdir(parents=True)
        (tmp_path / "archive" / f"2026-01-0{day}" / "events.ndjson").write_bytes(
            joined(event(day), b"{broken on day %d" % day)
        )
    cli("backfill", "--workers", "3", tmp_path / "archive", code=3)
    kept = sorted((each.file, each.raw) for path in rejects.files(cli.spool) for each in rejects.read(path))
    assert kept == [
        (str(tmp_path / "archive" / f"2026-01-0{day}" / "events.ndjson"), b"{broken on day %d" % day)
        for day in (1, 2, 3)
    ]


def test_parallel_backfills_of_the_same_lines_keep_each_reject_once(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        for n in range(10):
            (tmp_path / name / f"events{n}.ndjson").write_bytes(joined(event(n), b"{broken %d" % n))
    threads = [
        threading.Thread(target=lambda name=name: cli("backfill", tmp_path / name, code=None))
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert number(one_connection, EVENTS) == 10
    assert number(one_connection, "SELECT sum(rejected) FROM analytics_loads") == 10
    assert len(rejected(cli.spool)) == 10
    assert not list((cli.spool / "rejected").glob("*.part"))


def test_writing_rejects_at_the_same_time_does_not_fail(tmp_path: Path) -> None:
    lines = [Rejected("a", n, "code", "reason", b"raw") for n in range(100)]
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(50):
                rejects.write(tmp_path, chunk(b"{broken"), lines)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(rejected(tmp_path)) == 100


# ---- known to the ledger ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "truncated", ["TRUNCATE analytics_events", "DELETE FROM analytics_events WHERE true"]
)
def test_backfill_again_restores_what_was_deleted(
    cli: Cli, one_connection: Connection, tmp_path: Path, truncated: str
) -> None:
    (tmp_path / "a.ndjson").write_bytes(joined(*[event(n) for n in range(20)], b"{broken"))
    cli("backfill", tmp_path, code=3)
    one_connection.execute(truncated.encode())
    one_connection.commit()
    printed = cli("backfill", tmp_path / "a.ndjson")
    assert "known 21" in printed and "backfill --again" in printed
    assert number(one_connection, EVENTS) == 0
    cli("backfill", "--again", tmp_path / "a.ndjson", code=3)
    assert number(one_connection, EVENTS) == 20
    cli("backfill", "--again", tmp_path / "a.ndjson", code=3)
    assert number(one_connection, EVENTS) == 20 and len(rejected(cli.spool)) == 1
    wrong = "SELECT count(*) FROM analytics_loads WHERE lines <> events + metrics + duplicates + rejected"
    assert number(one_connection, wrong) == 0


def test_backfill_again_of_what_was_never_loaded_loads_it_once(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(joined(*[event(n) for n in range(20)]))
    cli("backfill", "--again", tmp_path / "a", tmp_path / "b")
    assert number(one_connection, EVENTS) == 20
    assert "known 20" in cli("backfill", tmp_path / "a")


# ---- tried again -----------------------------------------------------------------------------------------

BIG: Final = 1_000_000
"""Bytes of a line of which four make a piece that is retried."""


def big_rejects(spool: Path, count: int, big: int = BIG) -> Path:
    """Return a reject file of more than one piece, whose lines can all be loaded now."""
    path = spool / "rejected" / "a-0.ndjson"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for n in range(count):
            line = event(n, metadata={"big": "x" * big, "n": n})
            file.write(Rejected("a.ndjson", n + 1, "postgres_23503", "no user", line).encode())
    return path


def test_a_retry_of_a_large_file_loads_it_in_pieces(connection: Connection, tmp_path: Path) -> None:
    path = big_rejects(tmp_path, 10)
    assert retry(connection, path).counts == Counts(10)
    assert not path.exists() and not list(path.parent.iterdir())
    assert rows(connection, "SELECT events FROM analytics_loads ORDER BY loaded_at, events DESC") == [
        (4,), (4,), (2,),
    ]  # fmt: skip


@pytest.mark.long
def test_the_memory_of_a_retry_is_bounded(cli: Cli, one_connection: Connection) -> None:
    big_rejects(cli.spool, 400)
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, *LOADER, "rejects", "retry"]
    peak = int(subprocess.check_output(command, env=cli.environment).split()[-1])
    print(f"{peak >> 10} MiB")
    assert peak < 150 << 10
    assert number(one_connection, EVENTS) == 400


def test_a_piece_that_fails_stays_with_all_that_follow(connection: Connection, tmp_path: Path) -> None:
    path = big_rejects(tmp_path, 10)
    as_owner(
        connection,
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.metadata->>'n' = '5' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; "
        "RETURN NEW; END $$; ALTER FUNCTION fail() SECURITY DEFINER; "
        "CREATE TRIGGER fail BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION fail()",
    )
    dsn = connection.info.dsn
    with database.connect(make_conninfo(dsn, user=ROLE)) as wire, pytest.raises(psycopg.OperationalError):
        retry(wire, path)
    assert [line for _, line, _ in rejected(tmp_path)] == [5, 6, 7, 8, 9, 10]
    assert number(connection, EVENTS) == 4 and [each.name for each in path.parent.iterdir()] == [path.name]
    as_owner(connection, "DROP TRIGGER fail ON analytics_events")
    assert retry(connection, path).counts == Counts(6)


def test_what_is_retried_and_cannot_be_kept_is_not_loaded(connection: Connection, tmp_path: Path) -> None:
    """On a full disk there is no space for the lines that stay rejected."""
    load(connection, [chunk(event(1), b"{broken")], tmp_path)
    (path,) = rejects.files(tmp_path)
    before = path.read_bytes()
    with pytest.raises(OSError), limited_file_size(0):
        retry(connection, path)
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [path.name]


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_damaged_reject_file_does_not_keep_the_others_from_being_retried(
    cli: Cli, one_connection: Connection
) -> None:
    path = big_rejects(cli.spool, 2, 10)
    damaged = path.with_name("A-0.ndjson")
    damaged.write_bytes(path.read_bytes() + b"half a li")
    printed = cli("rejects", "retry", code=1)
    assert "A-0.ndjson, line 3: not a reject line" in printed and "events 2" in printed
    assert damaged.exists() and not path.exists() and number(one_connection, EVENTS) == 2


@pytest.mark.parametrize("command", ["run", "prune"])
def test_temporary_files_that_a_crash_left_are_removed(
    cli: Cli, one_connection: Connection, command: str
) -> None:
    (cli.spool / "rejected").mkdir()
    old, new = (cli.spool / "rejected" / f"{name}.part" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    os.utime(old, (1, 1))
    if command == "run":
        with cli.daemon():
            eventually(lambda: not old.exists())
    else:
        cli.owner()("prune", "--older-than", "90d")
    assert new.exists() and not old.exists()
