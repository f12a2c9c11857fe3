"""A disclosure about a person equals an independent search, and exported files are erased."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import orjson
import pytest

from loader.load.database import Connection
from tests.load.lines import rows, segment
from tests.operate.erase import story
from tests.operate.erase.story import ANNA, BERT, CARL, OTHER_HOME, facts, mentioning, of
from tests.processes import Cli

BROKEN = b',"more":1}'


@pytest.fixture
def archive(cli: Cli, tmp_path: Path) -> Path:
    """Return an archive with lines of three people, who also have rows, rejects and lines in the spool."""
    archive = tmp_path / "archive"
    first = [of(who, 10 * n + m) for n, who in enumerate([ANNA, BERT, CARL]) for m in range(4)]
    broken = [of(ANNA, 90)[:-1] + BROKEN, of(BERT, 91)[:-1] + BROKEN, b"{\xff" + ANNA.hex.encode()]
    segment(cli.spool, 1, *first, *mentioning(ANNA, 100), *mentioning(CARL, 200), *broken)
    cli("run", "--once", "--archive", archive, code=3)
    cli.owner()("rollup")
    segment(cli.spool, 2, of(ANNA, 300), of(BERT, 301), *mentioning(ANNA, 400)[:3])
    (cli.spool / "20260120T120000.000000Z-web-0a1b2c3d-42-deadbeef-000003.open").write_bytes(
        of(ANNA, 500) + b"\n" + of(BERT, 501) + b"\n" + b"\0" * 100
    )
    return archive


def lines_with(path: Path) -> int:
    """Return the number of lines in a file with Anna, by an independent search."""
    return sum(ANNA.hex in story.plain(line) for line in story.content(path).split(b"\n"))


def test_the_disclosure_equals_an_independent_search(
    cli: Cli, one_connection: Connection, archive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "anna.ndjson"
    counts = json.loads(cli.owner()("export", out, "--user", str(ANNA), "--archive", archive, "--json"))
    found = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    by_file: dict[str, int] = {}
    for each in found:
        by_file[each["_source"]] = by_file.get(each["_source"], 0) + 1
    expected = {f"spool/{path.name}": lines_with(path) for path in cli.spool.glob("2*")}
    for path in story.files(archive):
        expected[f"archive/{path.relative_to(archive)}"] = lines_with(path)
    for (table,) in rows(
        one_connection, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ '^analytics'"
    ):
        texts = rows(one_connection, f"SELECT each::text FROM {table} AS each")
        expected[f"table {table}"] = sum(ANNA.hex in story.plain(text.encode()) for (text,) in texts)
    for path in (cli.spool / "rejected").glob("*.ndjson"):
        raws = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        expected[f"rejected/{path.name}"] = sum(
            "raw_base64" in raw or str(ANNA) in raw["raw"] for raw in raws
        )
    assert by_file == {source: count for source, count in expected.items() if count}
    assert counts["rows"] == sum(count for source, count in expected.items() if source.startswith("table"))
    own = [
        each["event_id"]
        for each in found
        if each["_source"] == "table analytics_events" and each["_found"] == "own"
    ]
    own_rows = rows(
        one_connection, f"SELECT event_id::text FROM analytics_events WHERE user_id = '{ANNA}' ORDER BY 1"
    )
    assert sorted(own) == [event_id for (event_id,) in own_rows] and len(own) == 4
    assert out.stat().st_mode & 0o007 == 0
    facts(cli, "--user", str(ANNA), "--archive", archive)
    cli("run", "--once", code=None)
    assert (
        json.loads(cli.owner()("export", out, "--user", str(ANNA), "--archive", archive, "--json"))["rows"]
        == 0
    )
    assert out.read_bytes() == b""


@pytest.mark.long
def test_a_disclosure_that_is_not_complete_fails(cli: Cli, archive: Path, tmp_path: Path) -> None:
    (path, *_) = archive.rglob("*.zst")
    path.write_bytes(path.read_bytes()[:-20])
    printed = cli.owner()("export", tmp_path / "a.ndjson", "--user", str(ANNA), "--archive", archive, code=1)
    assert path.name in printed and "the disclosure is incomplete" in printed
    assert path.name in cli.owner()("erase", "--user", str(ANNA), "--archive", archive, code=1)


@pytest.mark.parametrize("option", [["--by", "day"], ["--since", "7d"], ["--format", "csv"]])
def test_a_disclosure_has_everything(cli: Cli, tmp_path: Path, option: list[str]) -> None:
    assert "always writes all data" in cli(
        "export", tmp_path / "a.ndjson", "--user", str(ANNA), *option, code=2
    )


@pytest.mark.long
@pytest.mark.parametrize("form", ["ndjson", "csv", "parquet"])
def test_exported_days_are_erased(cli: Cli, one_connection: Connection, tmp_path: Path, form: str) -> None:
    days = tmp_path / "days"
    quoted = of(BERT, 50, metadata={"text": 'a "quoted", line\nand another'})
    segment(cli.spool, 1, of(ANNA, 1), of(BERT, 2), of(CARL, 3, OTHER_HOME), quoted, *mentioning(ANNA, 100))
    cli("run", "--once")
    cli.owner()("export", days, "--by", "day", "--format", form)
    cli.owner()("export", days / f"metrics.{form}", "--table", "metrics")
    erased = facts(cli, "--user", str(ANNA), "--exports", days, "--verify")
    assert erased["export_lines"] == 1 + 16
    again = tmp_path / "again"
    cli.owner()("export", again, "--by", "day", "--format", form)
    cli.owner()("export", again / f"metrics.{form}", "--table", "metrics")
    for path in story.files(days):
        other = again / path.relative_to(days)
        assert sorted(read(path)) == sorted(read(other)), path
    (cli.spool / "x").mkdir()
    assert story.found_in_files(ANNA, cli.spool) == []


def read(path: Path) -> list[str]:
    """The rows of an exported file, without the ways to write JSON."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return [repr(row) for row in pq.read_table(path).to_pylist()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [repr(row) for row in csv.reader(file)]
    return [repr(orjson.loads(line)) for line in path.read_bytes().splitlines()]
