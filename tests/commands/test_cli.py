"""The command line: every error is one line with a remedy and the right exit code."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from loader.load.database import Connection
from tests.load.lines import event, joined, metric, number, segment
from tests.processes import HANGS_AFTER, LOADER, Cli, environment

EVENTS = "SELECT count(*) FROM analytics_events"


def test_a_broken_line_is_rejected_with_its_place_and_the_rest_is_loaded(
    cli: Cli, one_connection: Connection
) -> None:
    path = segment(cli.spool, 1, event(1), b'{"event_id": 7}', event(2))
    assert "events 2" in cli("run", "--once", code=3)
    (reject_file,) = (cli.spool / "rejected").iterdir()
    assert reject_file.name.startswith(f"{path.stem}-0-")
    (reject,) = [json.loads(line) for line in reject_file.open()]
    assert (reject["file"], reject["line"], reject["raw"]) == (path.name, 2, '{"event_id": 7}')
    assert reject["reason"] and reject["code"] == "invalid_field"
    assert "invalid_field 1" in cli("rejects", "list")
    assert f"{path.name}, line 2: invalid_field" in cli("rejects", "show", reject_file.name)
    assert "rejected 1" in cli("rejects", "retry", code=3)


def test_rejects_retry_loads_what_became_loadable_and_leaves_the_rest(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute("ALTER TABLE analytics_metrics ADD CONSTRAINT small CHECK (value < 1000)")
    one_connection.commit()
    segment(cli.spool, 1, metric(1, value=5), metric(2, value=123456), b"{broken")
    cli("run", "--once", code=3)
    one_connection.execute("ALTER TABLE analytics_metrics DROP CONSTRAINT small")
    one_connection.commit()
    assert "metrics 1" in cli("rejects", "retry", code=3)
    assert json.loads(cli("rejects", "list", "--json"))["codes"] == {"invalid_json": 1}
    assert number(one_connection, "SELECT sum(value) FROM analytics_metrics") == 123461


def test_backfill_reads_every_kind_of_file_and_changes_none(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    (archive / "2025").mkdir(parents=True)
    parts = [joined(*[event(n * 10 + i) for i in range(10)]) for n in range(5)]
    (archive / "a.ndjson").write_bytes(parts[0])
    (archive / "2025" / "b.ndjson.gz").write_bytes(gzip.compress(parts[1]))
    (archive / "c.ndjson.zst").write_bytes(zstandard.compress(parts[2]) + zstandard.compress(parts[3]))
    before = {path: path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    assert "events 40" in cli("backfill", "--dry-run", archive)
    assert number(one_connection, EVENTS) == 0
    assert "events 40" in cli("backfill", archive)
    assert "events 10" in cli("backfill", "-", stdin=parts[4])
    assert "duplicates 50" in cli("backfill", "-", stdin=b"".join(parts))
    assert {path: path.read_bytes() for path in archive.rglob("*") if path.is_file()} == before
    assert number(one_connection, EVENTS) == 50


def test_backfill_of_a_damaged_file_loads_the_others_and_names_it(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(joined(event(1)))[:-9])
    (tmp_path / "b.ndjson.zst").write_bytes(b"no such thing")
    (tmp_path / "c.ndjson").write_bytes(joined(event(2)))
    names = [tmp_path / name for name in ("a.ndjson.gz", "b.ndjson.zst", "c.ndjson")]
    printed = cli("backfill", *names, code=1)
    assert "a.ndjson.gz could not be read" in printed and "b.ndjson.zst could not be read" in printed
    assert number(one_connection, EVENTS) >= 1


def test_status_reports_the_backlog_and_the_loaded_rows(cli: Cli) -> None:
    segment(cli.spool, 1, event(1), event(1), b"{broken")
    waiting = json.loads(cli("status", "--json"))
    assert waiting["spool"]["sealed_files"] == 1 and waiting["spool"]["lag_seconds"] > 0
    cli("run", "--once", code=3)
    done = json.loads(cli("status", "--json"))
    assert done["spool"]["sealed_files"] == 0 and done["spool"]["rejected"] == {"invalid_json": 1}
    counts = {name: done["database"][name] for name in ("lines", "events", "duplicates", "rejected")}
    assert counts == {"lines": 3, "events": 1, "duplicates": 1, "rejected": 1}
    assert "duplicates" in cli("status")


def test_status_shows_the_spool_when_the_database_is_gone(cli: Cli) -> None:
    printed = cli("status", "--dsn", "host=/nowhere", code=4)
    assert "sealed files" in printed and "out of reach" in printed


def test_the_demo_finds_every_acknowledged_emit_once() -> None:
    ended = subprocess.run(
        [*LOADER, "demo"], env=environment(), capture_output=True, text=True, timeout=HANGS_AFTER
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SIGKILL" in ended.stdout and "Rows by event and metric" in ended.stdout
    (page,) = re.findall(r"a page without scripts: (\S+)", ended.stdout)
    assert "Unusual hours" in Path(page).read_text("utf-8")
    Path(page).unlink()


def test_nothing_of_the_data_reaches_the_terminal_raw(cli: Cli) -> None:
    segment(cli.spool, 1, b'{"event_id":"\x1b[31m\\u001b[2J", "x": [red]}')
    cli("run", "--once", code=3)
    assert "\x1b" not in cli("rejects", "show")


def test_loader_runs_as_a_module_and_as_a_script() -> None:
    script = Path(sys.executable).with_name("loader")
    for command in ([*LOADER, "--version"], [str(script), "--version"]):
        assert "0.1.0" in subprocess.check_output(command, text=True)


@pytest.mark.parametrize("path", ["{}", "", ".", "/nowhere:{}:"])
def test_a_loader_py_of_the_application_does_not_shadow_the_script(tmp_path: Path, path: str) -> None:
    (tmp_path / "loader.py").write_text("raise SystemExit('of the application')")
    script = Path(sys.executable).with_name("analytics-loader")
    variables = environment(PYTHONPATH=path.format(tmp_path))
    for arguments in (["--version"], ["status", "--help"]):
        printed = subprocess.check_output([str(script), *arguments], cwd=tmp_path, env=variables, text=True)
        assert printed.startswith(("loader, version 0.1.0", "Usage: loader status"))


def test_the_rejects_that_are_shown_can_be_limited(cli: Cli) -> None:
    segment(cli.spool, 1, b"one", b"two")
    segment(cli.spool, 2, b"three")
    cli("run", "--once", code=3)
    assert len(cli("rejects", "show", "--json").splitlines()) == 3
    shown = cli("rejects", "show", "--limit", "2", "--json").splitlines()
    assert [json.loads(line)["raw"] for line in shown] == ["one", "two"]


def test_rejects_are_exported_as_they_were_repaired_and_dropped(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    wrong = joined(event(1)).replace(b"memory_posted", b"Memory")
    segment(cli.spool, 1, wrong.removesuffix(b"\n"), b"\xff\x1b[31m", event(2))
    cli("run", "--once", code=3)
    assert cli.run("rejects", "export").stdout == wrong + b"\xff\x1b[31m\n"
    repair = tmp_path / "repair.ndjson"
    assert cli("rejects", "export", "--code", "invalid_name", "--output", repair) == "lines 1\n"
    assert repair.read_bytes() == wrong
    repair.write_bytes(wrong.replace(b"Memory", b"memory_posted"))
    assert "events 1" in cli("backfill", repair)
    assert number(one_connection, EVENTS) == 2

    assert "name the files" in cli("rejects", "drop", "--yes", code=2)
    assert "1 lines would be deleted permanently" in cli(
        "rejects", "drop", "--all", "--code", "invalid_name", code=2
    )
    assert len(cli("rejects", "show", "--json").splitlines()) == 2
    assert (
        cli("rejects", "drop", "--all", "--code", "invalid_name", "--yes")
        == "dropped 1 lines (invalid_name 1)\n"
    )
    (kept,) = cli("rejects", "show", "--json").splitlines()
    assert json.loads(kept)["raw_base64"]
    (name,) = (path.name for path in (cli.spool / "rejected").iterdir())
    assert json.loads(cli("rejects", "drop", name, "--yes", "--json")) == {"dropped": {"not_utf8": 1}}
    assert list((cli.spool / "rejected").iterdir()) == []
    assert cli("rejects", "drop", "--all", "--yes") == "dropped 0 lines (none)\n"
