"""Loaded files can be archived, old data can be pruned, and archived files can be loaded again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import zstandard

from loader.load.database import Connection
from tests.load.lines import STEM, event, metric, number, rows, segment
from tests.processes import HANGS_AFTER, LOADER, Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"
OLD = "2020-01-01T00:00:00Z"
LONG_AGO = 1.5e9
AGE_LOADS = "UPDATE analytics_loads SET loaded_at = '2020-01-01'"
NOW = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def pruned(cli: Cli, *arguments: str | Path) -> dict[str, int]:
    printed = json.loads(cli.owner()("prune", "--older-than", "90d", "--json", *arguments))
    return {name: count for name, count in printed.items() if type(count) is int}


def test_an_archive_holds_what_was_loaded_and_backfill_reads_it_back(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    paths = [segment(cli.spool, n, *[event(100 * n + i) for i in range(50)], b"{broken") for n in (1, 2)]
    data = {path.name: path.read_bytes() for path in paths}
    cli("run", "--once", "--archive", archive, code=3)
    assert not list(cli.spool.glob("2*"))
    kept = {path: path for path in archive.rglob("*.zst")}
    assert {path.parent.name for path in kept} == {"20260120"}
    assert {path.stem: zstandard.decompress(path.read_bytes(), 1 << 20) for path in kept} == data
    assert all(path.stat().st_mode & 0o7777 & ~0o640 == 0 for path in kept)
    assert "known 102" in cli("backfill", archive)
    one_connection.execute("TRUNCATE analytics_events, analytics_loads")
    one_connection.commit()
    assert "events 100" in cli("backfill", archive, code=3)


def test_a_crash_between_archiving_and_removing_is_mended(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    path = segment(cli.spool, 1, event(1))
    data = path.read_bytes()
    cli("run", "--once", "--archive", archive)
    path.write_bytes(data)
    (archive / "20260120" / f"{path.name}.part").write_bytes(b"half")
    assert "known 1" in cli("run", "--once", "--archive", archive)
    assert [each.name for each in (archive / "20260120").iterdir()] == [f"{path.name}.zst"]
    assert not path.exists() and number(one_connection, EVENTS) == 1


def test_an_archive_that_cant_be_written_keeps_the_file_in_the_spool(cli: Cli, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "20260120").symlink_to(cli.spool.parent)
    path = segment(cli.spool, 1, event(1))
    assert "is loaded, but could not be removed" in cli("run", "--once", "--archive", archive, code=1)
    assert path.exists()
    (archive / "20260120").unlink()
    assert "known 1" in cli("run", "--once", "--archive", archive)


def test_prune_removes_what_is_old_and_nothing_else(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    segment(cli.spool, 1, *[event(n, timestamp=OLD, event_type=f"type_{n % 7}") for n in range(70)])
    segment(cli.spool, 2, *[metric(n, timestamp=OLD) for n in range(30)], b"{broken")
    new = [event(100 + n, timestamp=NOW) for n in range(5)]
    segment(cli.spool, 3, *new, metric(100, timestamp=NOW), b"{broken too")
    cli("run", "--once", "--archive", archive, code=3)
    for path in [*archive.rglob("*00000[12].ndjson.zst"), *cli.spool.rglob("rejected/*000002-*")]:
        os.utime(path, (LONG_AGO, LONG_AGO))
    (cli.spool / "rejected" / "mine.txt").write_text("keep")
    os.utime(cli.spool / "rejected" / "mine.txt", (LONG_AGO, LONG_AGO))
    expected = {"events": 70, "metrics": 30, "loads": 0, "rejected_files": 1, "archived_files": 2}
    assert pruned(cli, "--archive", archive, "--dry-run") == expected
    assert number(one_connection, EVENTS) == 75
    assert pruned(cli, "--archive", archive) == expected
    assert number(one_connection, EVENTS) == 5
    assert number(one_connection, "SELECT count(*) FROM analytics_metrics") == 1
    assert [path.name for path in archive.rglob("*.zst")] == [f"{STEM.format(3)}.ndjson.zst"]
    assert len(list((cli.spool / "rejected").iterdir())) == 2
    assert set(pruned(cli, "--archive", archive).values()) == {0}


def test_a_writers_ledger_goes_together_so_that_no_segment_seems_to_be_missing(
    cli: Cli, one_connection: Connection
) -> None:
    missing = "SELECT count(*) FROM analytics_missing_segments"
    for n in (1, 2, 3):
        segment(cli.spool, n, event(n))
    for n in (1, 2):
        path = segment(cli.spool, 100 + n, event(100 + n))
        path.rename(path.with_name(path.name.replace("deadbeef", "0badcafe").replace("0001", "0000")))
    cli("run", "--once")
    assert number(one_connection, missing) == 0
    for writer in ("deadbeef-000001", "0badcafe"):
        one_connection.execute(f"{AGE_LOADS} WHERE file LIKE '%{writer}%'".encode())
    one_connection.commit()
    assert pruned(cli)["loads"] == 2  # of the writer that has exited; segment 3 of the other one is new
    assert number(one_connection, missing) == 0
    one_connection.execute(AGE_LOADS.encode())
    one_connection.commit()
    assert pruned(cli)["loads"] == 3


def new_are(connection: Connection, count: int) -> bool:
    return number(connection, f"{EVENTS} WHERE event_type <> 'old'") == count


def test_prune_deletes_in_batches_while_the_loader_loads(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
        "SELECT gen_random_uuid(), 'old', '2020-01-01'::timestamptz + n % 997 * interval '1 s', "
        "gen_random_uuid(), gen_random_uuid() FROM generate_series(1, 30000) AS n"
    )
    one_connection.commit()
    with cli.daemon():
        pruning = subprocess.Popen(
            [*LOADER, "prune", "--older-than", "90d", "--json"],
            env=cli.owner().environment,
            stdout=subprocess.PIPE,
        )
        for n in range(20):
            segment(cli.spool, n + 1, event(n, timestamp=NOW))
            eventually(partial(new_are, one_connection, n + 1))
        assert json.loads(pruning.communicate(timeout=HANGS_AFTER)[0])["events"] == 30_000
    assert number(one_connection, EVENTS) == 20


def test_an_interrupted_prune_reports_how_to_continue(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
        "SELECT gen_random_uuid(), 'old', '2020-01-01', gen_random_uuid(), gen_random_uuid() "
        "FROM generate_series(1, 100000)"
    )
    one_connection.commit()
    command = [*LOADER, "prune", "--older-than", "1d"]
    pruning = subprocess.Popen(
        command, env=cli.owner().environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    eventually(lambda: number(one_connection, EVENTS) < 100_000)
    pruning.send_signal(signal.SIGINT)
    printed, errors = (part.decode() for part in pruning.communicate(timeout=HANGS_AFTER))
    left = number(one_connection, EVENTS)
    assert pruning.returncode == 1 and "run the command again to continue" in errors
    assert f"events {100_000 - left}" in printed and left > 0
    cli.owner()("prune", "--older-than", "1d")
    assert number(one_connection, EVENTS) == 0


def test_the_loaders_role_may_not_prune(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, event(1, timestamp=OLD))
    cli("run", "--once")
    assert "permission denied" in cli("prune", "--older-than", "1d", code=1)
    assert number(one_connection, EVENTS) == 1


@pytest.mark.parametrize("plant", ["link", "name"])
def test_prune_removes_nothing_outside(cli: Cli, tmp_path: Path, plant: str) -> None:
    outside, archive = tmp_path / "outside", tmp_path / "archive"
    outside.mkdir()
    archive.mkdir()
    (outside / "a.ndjson.zst").write_bytes(b"")
    os.utime(outside / "a.ndjson.zst", (LONG_AGO, LONG_AGO))
    if plant == "link":
        (archive / "20200101").symlink_to(outside)
        cli.owner()("prune", "--older-than", "1d", "--archive", archive, code=1)
    else:
        (archive / "..notaday").mkdir()
        (archive / "20200101").mkdir()
        (archive / "20200101" / "a.ndjson.zst").symlink_to(outside / "a.ndjson.zst")
        cli.owner()("prune", "--older-than", "1d", "--archive", archive)
    assert (outside / "a.ndjson.zst").exists()


def test_rows_of_every_kind_are_found(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, *[event(n, timestamp=OLD, event_type=f"kind_{n}") for n in range(40)])
    cli("run", "--once")
    assert pruned(cli)["events"] == 40
    assert rows(one_connection, EVENTS) == [(0,)]
