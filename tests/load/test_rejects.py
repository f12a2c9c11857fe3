"""A reject is bounded by its line, its file belongs to one chunk, and the tools read what was written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from loader.files import rejects
from loader.files.chunk import CHUNK_BYTES
from loader.files.rejects import Rejected
from loader.load.batch import load
from loader.load.database import Connection
from tests.load.lines import ID, chunk, event, joined, number, rejected, segment
from tests.processes import Cli

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
    """Each of its bytes is six in a reject file."""
    line = b"\x01" * (CHUNK_BYTES - 2)
    segment(cli.spool, 1, line, event(1))
    cli("run", "--once", code=3)
    assert [each.raw for path in rejects.files(cli.spool) for each in rejects.read(path)] == [line]
    for command in ("rejects list", "rejects show", "status"):
        cli(*command.split())
    cli("doctor", code=None)


def test_a_reject_file_larger_than_a_gibibyte_is_read(tmp_path: Path, cli: Cli) -> None:
    """As an older loader wrote them."""
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
