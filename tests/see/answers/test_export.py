"""`loader export`: other programs can read the exported tables, and NDJSON loads into an empty database."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.errors import UsageError
from loader.load import schema
from loader.see.export import EVENTS, Export, column
from tests.processes import LOADER, environment
from tests.see.answers.conftest import HOSTILE, Reader, World

pyarrow = pytest.importorskip("pyarrow", reason="the extra export is not installed")
pytest.importorskip("adbc_driver_postgresql", reason="the extra export is not installed")
COLUMNS = (
    "--column",
    "metadata.duration_ms:float",
    "--column",
    "metadata.page:int",
    "--column",
    "metadata.source",
)
TOTALS = (
    "SELECT count(*), count(DISTINCT event_id), min(timestamp), max(timestamp), "
    "sum((metadata->>'duration_ms')::float8), sum((metadata->>'page')::int), count(metadata->>'source'), "
    "count(session_id) FROM analytics_events"
)


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("export") / "events.parquet"
    Reader(world)("export", file, *COLUMNS)
    return file


@pytest.fixture(scope="module")
def totals(world: World, exported: Path) -> tuple[Any, ...]:
    (row,) = world.connection.execute(TOTALS).fetchall()
    return row


def test_pyarrow_reads_it_with_the_right_types(exported: Path, totals: tuple[Any, ...]) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(exported)
    assert {field.name: str(field.type) for field in table.schema} == {
        "event_id": "string", "event_type": "string", "timestamp": "timestamp[us, tz=UTC]",
        "user_id": "string",
        "family_unit_id": "string", "session_id": "string", "metadata": "string",
        "created_at": "timestamp[us, tz=UTC]",
        "duration_ms": "double", "page": "int64", "source": "string",
    }  # fmt: skip
    assert table.num_rows == totals[0]
    assert sum(value or 0 for value in table["page"].to_pylist()) == totals[5]
    assert HOSTILE in set(table["event_type"].to_pylist())


def test_pandas_reads_it(exported: Path, totals: tuple[Any, ...]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(exported)
    assert (len(frame), frame.event_id.nunique(), frame.duration_ms.sum()) == (
        totals[0],
        totals[1],
        totals[4],
    )
    assert frame.timestamp.min().to_pydatetime() == totals[2] and str(frame.timestamp.dt.tz) == "UTC"
    assert json.loads(frame.metadata.iloc[0]) is not None


def test_polars_reads_it(exported: Path, totals: tuple[Any, ...]) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.read_parquet(exported)
    assert frame.schema["user_id"] == polars.String and frame.schema["timestamp"] == polars.Datetime(
        "us", "UTC"
    )
    assert (frame.height, frame["duration_ms"].sum(), frame["timestamp"].max()) == (
        totals[0],
        totals[4],
        totals[3],
    )


def test_duckdb_reads_it(exported: Path, totals: tuple[Any, ...]) -> None:
    duckdb = pytest.importorskip("duckdb")
    row = duckdb.execute(
        "SELECT count(*), count(DISTINCT event_id), sum(duration_ms), count(source), count(session_id), "
        "sum((metadata->>'page')::int) FROM read_parquet(?)", [str(exported)],
    ).fetchone()  # fmt: skip
    assert row == (totals[0], totals[1], totals[4], totals[6], totals[7], totals[5])


def test_a_file_per_local_day_is_one_table_in_hive_layout(
    reader: Reader, world: World, tmp_path: Path
) -> None:
    duckdb = pytest.importorskip("duckdb")
    target, zone = tmp_path / "archive", ZoneInfo("Asia/Kolkata")
    reader("export", target, "--by", "day", "--since", "5d", "--until", "today", "--tz", zone.key)
    found = duckdb.execute(
        "SELECT day::varchar, count(*) FROM read_parquet(?, hive_partitioning = true) GROUP BY 1 ORDER BY 1",
        [f"{target}/*/part.parquet"],
    ).fetchall()
    today = datetime.now(UTC).astimezone(zone).date()
    expected = world.connection.execute(
        "SELECT (timestamp AT TIME ZONE 'Asia/Kolkata')::date::text, count(*) FROM analytics_events "
        "WHERE (timestamp AT TIME ZONE 'Asia/Kolkata')::date >= %s AND (timestamp AT TIME ZONE "
        "'Asia/Kolkata')::date < %s "
        "GROUP BY 1 ORDER BY 1", [today - timedelta(days=5), today],
    ).fetchall()  # fmt: skip
    assert found == expected and len(found) == 5


def test_a_day_can_be_exported_again_and_a_day_without_rows_loses_its_file(
    reader: Reader, tmp_path: Path
) -> None:
    stale = tmp_path / "day=1999-01-02" / "part.parquet"
    stale.parent.mkdir()
    stale.write_bytes(b"from before the rows were deleted")
    words = ("export", tmp_path, "--by", "day", "--since", "1999-01-01", "--until", "1999-01-05")
    assert "rows 0" in reader(*words).out
    assert not stale.exists()


def test_ndjson_into_an_empty_database_gives_equal_rows(reader: Reader, world: World, tmp_path: Path) -> None:
    name = f"again_{uuid.uuid4().hex}"
    events, metrics = tmp_path / "events.ndjson", tmp_path / "metrics.ndjson"
    # Names that the loader refuses cannot be loaded again; they were inserted without the loader.
    with psycopg.connect(world.dsn, autocommit=True) as owner:
        owner.execute("CREATE DATABASE " + name)
    reader("export", events)
    reader("export", metrics, "--table", "metrics")
    again = make_conninfo(world.dsn, dbname=name)
    with psycopg.connect(again) as connection:
        schema.apply_schema(connection)
    spool = tmp_path / "spool"
    spool.mkdir()
    loaded = subprocess.run(
        [*LOADER, "backfill", "--json", events, metrics],
        env=environment(LOADER_DSN=again, SPOOL_DIR=str(spool)),
        capture_output=True, text=True,
    )  # fmt: skip
    refused = world.number("SELECT count(*) FROM analytics_events WHERE event_type = %s", HOSTILE)
    assert json.loads(loaded.stdout)["rejected"] in (0, refused), loaded.stdout + loaded.stderr
    for rows in (
        "SELECT event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata FROM "
        "analytics_events "
        "WHERE event_type ~ '^[a-z0-9_]+$' ORDER BY 1",
        "SELECT id, metric_name, metric_type, value, labels, timestamp FROM analytics_metrics ORDER BY 1",
    ):
        with psycopg.connect(again) as connection:
            assert (
                connection.execute(rows.encode()).fetchall()
                == world.connection.execute(rows.encode()).fetchall()
            )


def test_csv_has_a_header_and_every_row(reader: Reader, world: World) -> None:
    words = (
        "export",
        "-",
        "--format",
        "csv",
        "--table",
        "metrics",
        "--since",
        "3d",
        "--column",
        "labels.endpoint",
    )
    until = datetime.now(UTC).isoformat()
    header, *rows = csv.reader(reader(*words, "--until", until).out.splitlines())
    assert header == [
        "id",
        "metric_name",
        "metric_type",
        "value",
        "labels",
        "timestamp",
        "created_at",
        "endpoint",
    ]
    statement = "SELECT count(*) FROM analytics_metrics WHERE timestamp >= %s AND timestamp < %s"
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=3)
    assert len(rows) == world.number(statement, midnight, until)


ODD: dict[str, Any] = {
    "v0": "12.5", "v1": "abc", "v2": 1e400, "v3": True, "v4": None, "v5": {"a": 1}, "v6": "", "v7": 2**70,
    "v8": -3, "v9": "1e999",
}  # fmt: skip


def test_values_of_another_type_are_null_and_counted(
    one_connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    values = [*ODD.values()]
    values[2] = "1" * 400
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata) "
        "SELECT gen_random_uuid(), 'odd', now(), gen_random_uuid(), gen_random_uuid(), "
        "jsonb_build_object('v', v) "
        "FROM jsonb_array_elements(%s::jsonb) v", [json.dumps(values)],
    )  # fmt: skip
    one_connection.commit()
    import pyarrow.parquet

    for kind, expected, misfits in (
        ("float", [12.5, float(2**70), -3.0], 6), ("int", [-3], 8), ("bool", [True], 8),
    ):  # fmt: skip
        file = tmp_path / f"{kind}.parquet"
        ended = subprocess.run(
            [*LOADER, "export", file, "--json", "--column", f"metadata.v:{kind}"],
            env=environment(LOADER_DSN=one_connection.info.dsn), capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        found = [value for value in pyarrow.parquet.read_table(file)["v"].to_pylist() if value is not None]
        assert sorted(found) == sorted(expected)
        assert json.loads(ended.stdout)["misfits"] == {"v": misfits} and "choose text" in ended.stderr


def test_a_file_appears_when_it_is_whole(reader: Reader, world: World, tmp_path: Path) -> None:
    file = tmp_path / "events.parquet"
    file.write_bytes(b"from yesterday")
    world.connection.execute(f"REVOKE SELECT ON analytics_events FROM {'analytics_reader'}")
    try:
        ended = reader("export", file, code=1)
    finally:
        world.connection.execute("GRANT SELECT ON analytics_events TO analytics_reader")
    assert "permission denied" in ended.err and ended.err.count("\n") == 1
    assert file.read_bytes() == b"from yesterday" and os.listdir(tmp_path) == [file.name]


def test_a_device_is_written_to_and_not_replaced(reader: Reader) -> None:
    reader("export", "/dev/null", "--format", "ndjson", "--since", "1d")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["events.xlsx"], "use the suffix .parquet, .csv or .ndjson"),
        (["-"], "unknown format"),
        (["-", "--format", "parquet"], "standard output supports only CSV and NDJSON"),
        (["nowhere/events.csv"], "is not a writable directory"),
        ([".", "--format", "csv"], "is a directory: name a file, or give --by day"),
        (["a.csv", "--since", "2026-01-02", "--until", "2026-01-01"], "is not before --until"),
        (["a.csv", "--column", "metadata.x:blob"], "a type is one of text, float, int, bool"),
        (["a.csv", "--column", "labels.x"], "analytics_events has no labels"),
        (["a.csv", "--column", "metadata.timestamp"], 'two columns would have the name "timestamp"'),
        (["a.ndjson", "--column", "metadata.x"], "--column requires Parquet or CSV"),
        (["a.csv", "--table", "users"], "users"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_exit_code_2(
    reader: Reader, words: list[str], part: str
) -> None:
    ended = reader.inside("export", *words)
    assert ended.code == 2 and part in ended.err and ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["metadata.a'b:text", 'metadata."x":int', "metadata.%s:float", "metadata.a.b.c:bool"]
)
def test_a_key_is_never_sql(reader: Reader, text: str, tmp_path: Path) -> None:
    reader("export", tmp_path / "a.csv", "--since", "1h", "--column", text)
    assert Export(EVENTS, "csv", [column(text)])


def test_a_column_without_a_key_is_refused() -> None:
    with pytest.raises(UsageError):
        column("metadata.:int")
