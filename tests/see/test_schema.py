"""Properties of the schema other than its answers: indexes, comments, a read-only role, search paths."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import indexes, schema
from loader.load.database import Connection
from spool.events import CATALOGUE
from tests.load.lines import event, number, rows, segment
from tests.processes import HANGS_AFTER, Cli, eventually
from tests.see import data

READER = "analytics_reader"
QUESTIONS = {
    "trend": "'2025-10-01', '2025-11-01', people => true", "active": "'2025-10-01', '2025-11-01'",
    "lifecycle": "'2025-10-01', '2025-11-01'", "retention": "'2025-10-01', '2025-11-01'",
    "funnel": "ARRAY['feed_viewed', 'memory_viewed'], '2025-10-01', '2025-11-01'",
    "sessions": "'2025-10-01', '2025-11-01'", "sessions_by_gap": "'2025-10-01', '2025-11-01'",
    "requests": "'2025-10-24', '2025-11-01', 'day'", "anomalies": "'2025-11-10', '2025-11-11'",
    "features": "'2025-11-01'", "interactions": "'2025-10-01', '2025-11-01'",
}  # fmt: skip
INDEXES = (
    "SELECT indexname FROM pg_indexes WHERE tablename IN ('analytics_events', 'analytics_metrics') "
    "AND indexname NOT LIKE '%key' ORDER BY 1"
)
EXPECTED = [
    ("analytics_events_family_time",), ("analytics_events_timestamp",), ("analytics_events_type_seen",),
    ("analytics_events_user_seen",), ("analytics_metrics_name_time",), ("analytics_metrics_timestamp",),
]  # fmt: skip


@pytest.fixture
def reader(one_connection: Connection) -> Iterator[Connection]:
    """Yield a connection as the reader, with rows in the tables."""
    data.insert(one_connection, [*data.events(7, users=20), *data.metrics(7, 500)])
    schema.apply_schema(one_connection, reader=READER)
    one_connection.commit()
    with psycopg.connect(make_conninfo(one_connection.info.dsn, user=READER), autocommit=True) as connection:
        yield connection


def test_the_reader_asks_every_question_and_changes_nothing(reader: Connection) -> None:
    for question, values in QUESTIONS.items():
        found = reader.execute(f"SELECT count(*) FROM analytics_{question}({values})".encode()).fetchone()
        assert found is not None
        assert found[0] or question == "anomalies"
    assert reader.execute("SHOW statement_timeout").fetchone() == ("30s",)
    assert reader.execute("SHOW jit").fetchone() == ("off",)
    reader.execute("SET default_transaction_read_only = off")
    for statement in (
        "DELETE FROM analytics_events", "INSERT INTO analytics_touched VALUES (now(), 'events')",
        "SELECT analytics_refresh()", "SELECT analytics_rebuild()",
        "SELECT analytics_mark('events', now(), now())",
        "SELECT analytics_prune_hour('events', '2025-10-01 00:00+00')",
        "SELECT analytics_roll_events(ARRAY[now()])", "TRUNCATE analytics_hourly_events",
        "CREATE TABLE mine (n INT)",
    ):  # fmt: skip
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute(statement.encode())


@pytest.mark.parametrize("kind", [pytest.param("role", marks=pytest.mark.long), "reader"])
def test_a_role_may_be_created_for_another_database_at_the_same_time(
    one_connection: Connection, kind: str
) -> None:
    name = f"{kind}_{uuid4().hex}"
    with (
        psycopg.connect(one_connection.info.dsn) as applying,
        ThreadPoolExecutor(1) as thread,
    ):
        one_connection.execute(f"CREATE ROLE {name}".encode())
        given: dict[str, Any] = {kind: name}
        applied = thread.submit(schema.apply_schema, applying, **given)
        eventually(lambda: is_blocked(one_connection, applying.info.backend_pid))
        one_connection.commit()
        assert applied.result(HANGS_AFTER).warnings == []
        assert number(applying, f"SELECT has_table_privilege('{name}', 'analytics_events', 'SELECT')::int")
    one_connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def is_blocked(connection: Connection, pid: int) -> bool:
    """Whether another session waits for this one."""
    return number(connection, f"SELECT cardinality(pg_blocking_pids({pid}))") > 0


@pytest.mark.parametrize(
    "planted",
    [
        "TABLE analytics_sealed (source TEXT, hour TIMESTAMPTZ, PRIMARY KEY (source, hour))",
        "FUNCTION analytics_seen(text, timestamptz, text, text, text, text[]) RETURNS TABLE (unit uuid, starts date) "
        "LANGUAGE sql AS 'SELECT NULL::uuid, NULL::date'",
        "FUNCTION analytics_unit(who text, user_id uuid, family_unit_id uuid) RETURNS uuid LANGUAGE sql AS 'SELECT user_id'",
    ],
    ids=["table", "overload", "function"],
)
def test_what_others_created_under_a_name_of_ours_is_refused(
    one_connection: Connection, planted: str
) -> None:
    other = f"other_{uuid4().hex}"
    one_connection.execute(
        "DROP TABLE analytics_sealed CASCADE; DROP FUNCTION IF EXISTS analytics_unit CASCADE"
    )
    one_connection.execute(f"CREATE ROLE {other}; GRANT CREATE ON SCHEMA public TO {other}".encode())
    one_connection.execute(f"SET ROLE {other}; CREATE {planted}; RESET ROLE".encode())
    one_connection.commit()
    with pytest.raises(psycopg.Error, match=r"belongs to the role|is not unique"):
        schema.apply_schema(one_connection)
    one_connection.execute(f"DROP OWNED BY {other} CASCADE; DROP ROLE {other}".encode())
    one_connection.commit()
    schema.apply_schema(one_connection)


def test_an_answer_does_not_depend_on_the_readers_search_path(reader: Connection) -> None:
    reader.execute("SET default_transaction_read_only = off")
    for question, values in QUESTIONS.items():
        statement = f"SELECT * FROM public.analytics_{question}({values})"
        reader.execute("SET search_path = public")
        expected = sorted(map(str, rows(reader, statement)))
        reader.execute("CREATE TEMP TABLE IF NOT EXISTS analytics_events (event_type TEXT)")
        reader.execute("CREATE TEMP TABLE IF NOT EXISTS analytics_touched (hour TEXT)")
        for path in ("pg_temp, public", "''", "pg_catalog"):
            reader.execute(f"SET search_path = {path}".encode())
            assert sorted(map(str, rows(reader, statement))) == expected, (question, path)


def test_a_loader_and_readers_of_an_older_installation_get_what_is_new(one_connection: Connection) -> None:
    """Without naming the roles again: privileges on the events extend to the related objects."""
    for statement in ("CREATE ROLE old_loader", "CREATE ROLE old_reader"):
        one_connection.execute(
            f"DO $$ BEGIN {statement}; EXCEPTION WHEN duplicate_object THEN END $$".encode()
        )
    one_connection.execute("GRANT SELECT, INSERT ON analytics_events, analytics_metrics TO old_loader")
    one_connection.execute("GRANT SELECT ON analytics_events, analytics_metrics TO old_reader")
    schema.apply_schema(one_connection)
    one_connection.execute("SET ROLE old_loader")
    one_connection.execute("INSERT INTO analytics_touched VALUES (now(), 'events')")
    one_connection.execute("SET ROLE old_reader")
    one_connection.execute("SELECT * FROM analytics_trend('2025-10-01', '2025-11-01')")


@pytest.mark.parametrize("rows_exist", [False, True])
def test_init_builds_the_indexes_of_an_older_installation(
    cli: Cli, one_connection: Connection, *, rows_exist: bool
) -> None:
    assert rows(one_connection, INDEXES) == EXPECTED
    one_connection.execute(
        "DROP INDEX analytics_events_type_seen, analytics_events_user_seen, analytics_metrics_timestamp"
    )
    one_connection.execute(
        "CREATE INDEX analytics_events_type_time ON analytics_events (event_type, timestamp)"
    )
    one_connection.execute("CREATE INDEX analytics_events_user_time ON analytics_events (user_id, timestamp)")
    if rows_exist:
        data.insert(one_connection, data.events(1, users=3))
    one_connection.commit()
    with psycopg.connect(
        one_connection.info.dsn
    ) as loading:  # which must not be blocked by an index in a transaction
        schema.apply_schema(loading)
        loading.commit()
    assert (rows(one_connection, INDEXES) == EXPECTED) is not rows_exist
    cli.owner()("init")
    assert rows(one_connection, INDEXES) == EXPECTED


def test_an_index_that_an_earlier_attempt_left_invalid_is_built_again(one_connection: Connection) -> None:
    valid = "SELECT bool_and(indisvalid) FROM pg_index WHERE indrelid = 'analytics_events'::regclass"
    data.insert(one_connection, data.events(1, users=3))
    one_connection.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'analytics_events_type_seen'::regclass"
    )
    one_connection.commit()
    assert rows(one_connection, valid) == [(False,)]
    assert indexes.build(one_connection) == ["analytics_events_type_seen"]
    assert rows(one_connection, valid) == [(True,)]
    assert not one_connection.autocommit


def test_psql_alone_applies_the_schema_and_the_reader(one_server: str, tmp_path: Path) -> None:
    name = f"psql_{uuid4().hex}"
    with psycopg.connect(one_server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    dsn = make_conninfo(one_server, dbname=name)
    script = tmp_path / "all.sql"
    files = [Path(schema.__file__).parents[1] / each for each in ("schema.sql", "reader.sql")]
    script.write_text(
        "SET analytics.reader = 'analytics_reader';\n" + "\n".join(each.read_text() for each in files)
    )
    for _ in range(2):
        subprocess.run(["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, "-f", script], check=True)
    with psycopg.connect(dsn) as connection:
        assert rows(connection, INDEXES) == EXPECTED
        assert number(connection, "SELECT count(*) FROM analytics_touched") == 0


def test_an_upgrade_reads_rows_until_the_first_refresh(cli: Cli, one_connection: Connection) -> None:
    """Tables without rollups, as of an earlier version, with rows whose loads left no mark."""
    segment(cli.spool, 1, event(1), event(2))
    cli("run", "--once")
    one_connection.execute("DROP TABLE analytics_touched CASCADE")
    one_connection.commit()
    segment(cli.spool, 2, event(3))
    assert "events 1" in cli("run", "--once")  # by a loader that finds no table for its mark
    schema.apply_schema(one_connection)
    one_connection.commit()
    total = "SELECT sum(events) FROM analytics_trend('2026-01-01', '2026-02-01')"
    assert number(one_connection, total) == 3
    data.refresh(one_connection)
    assert number(one_connection, "SELECT sum(events) FROM analytics_hourly_events") == 3
    assert number(one_connection, total) == 3


def test_every_function_and_view_has_a_comment(one_connection: Connection) -> None:
    without = rows(
        one_connection,
        "SELECT proname FROM pg_proc WHERE proname LIKE 'analytics%' AND obj_description(oid, 'pg_proc') "
        "IS NULL",
    )
    assert without == []
    for question in QUESTIONS:
        assert rows(one_connection, f"SELECT obj_description('analytics_{question}'::regproc)") != [(None,)]
    for view in ("analytics_events_daily", "analytics_metrics_hourly"):
        ((comment,),) = rows(one_connection, f"SELECT obj_description('{view}'::regclass)")
        assert "Always reads the whole table" in comment


def test_features_have_a_column_for_each_type_of_the_catalogue_and_window(one_connection: Connection) -> None:
    columns = [c.name for c in one_connection.execute("SELECT * FROM analytics_features()").description or ()]
    expected = [f"{name}_{window}" for name in CATALOGUE for window in ("1d", "7d", "28d")]
    assert columns[-len(expected) :] == expected
    assert len(columns) == 18 + 51


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("trend('2025-10-01', '2025-11-01', 'fortnight')", "fortnight"),
        ("trend('-infinity')", "since and until must be finite"),
        ("trend('2025-10-01', '2025-11-01', 'day', 'Mars/Olympus')", "Mars/Olympus"),
        ("active('2025-10-01', '2025-11-01', 'UTC', 'pets')", "who must be user or family, not pets"),
        (
            "lifecycle('2025-10-01', '2025-11-01', 'hour')",
            "bucket must be day, week, month, quarter or year, not hour",
        ),
        (
            "retention('2025-10-01', '2025-11-01', 'minute')",
            "bucket must be day, week, month, quarter or year, not minute",
        ),
        ("funnel(ARRAY[]::text[], '2025-10-01')", "a funnel has 1 to 12 steps"),
        ("funnel(ARRAY['a'], '2025-10-01', who => 'pets')", "who must be user, family or session, not pets"),
    ],
)
def test_a_wrong_argument_is_refused(one_connection: Connection, question: str, words: str) -> None:
    data.insert(one_connection, data.events(1, users=3))
    with pytest.raises(psycopg.Error, match=words):
        one_connection.execute(f"SELECT * FROM analytics_{question}".encode())


def test_quarters_and_years(one_connection: Connection) -> None:
    data.insert(one_connection, data.events(1, users=5))
    total = number(one_connection, "SELECT count(DISTINCT user_id) FROM analytics_events")
    for bucket in ("quarter", "year"):
        question = f"analytics_lifecycle('2024-11-01', '2026-06-01', '{bucket}')"
        assert number(one_connection, f"SELECT sum(new) FROM {question}") == total
        found = one_connection.execute(f"SELECT starts FROM {question} ORDER BY 1".encode()).fetchall()
        assert found[0] == (datetime(2024, 10 if bucket == "quarter" else 1, 1).date(),)


def test_the_tables_may_lie_in_a_schema_of_their_own(one_connection: Connection) -> None:
    """The schema's name needs quotes; it is first in the search path for the upgrade, and alone for the questions."""
    one_connection.execute('CREATE SCHEMA "Our analytics"')
    one_connection.commit()
    ours = make_conninfo(one_connection.info.dsn, options=r'-csearch_path="Our\ analytics"')
    with psycopg.connect(ours) as connection:
        schema.apply_schema(connection, role="analytics_loader", reader=READER)
        data.insert(connection, data.events(1, users=5))
    one_connection.execute("SET ROLE analytics_loader; SET search_path = pg_catalog")
    one_connection.commit()
    with one_connection.transaction():
        one_connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert number(one_connection, 'SELECT "Our analytics".analytics_refresh(100000)') > 0
    one_connection.execute(f"SET ROLE {READER}".encode())
    for question, values in QUESTIONS.items():
        one_connection.execute(f'SELECT * FROM "Our analytics".analytics_{question}({values})'.encode())
    one_connection.execute("RESET ROLE; SET search_path = public")
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 0
