"""Objects that other roles create in the tables' schema are never called with the privileges of `loader init`.

The planted functions and operators match better than those of pg_catalog if an argument's type is not exactly
that of an operator or function there. Then only a qualified name helps, not the search path.
"""

from __future__ import annotations

import re
import subprocess
import uuid
from importlib import resources
from pathlib import Path

import psycopg
import pytest

from loader.load import schema
from loader.load.database import Connection
from tests.load.lines import event, metric, number, segment
from tests.processes import Cli
from tests.servers import ROLE

TYPES = (
    "uuid", "text", "varchar", "name", "oid", "regclass", "regtype", "int2", "int4", "int8", "bytea", "numeric", "jsonb",
    "json", "bool", "float8", "timestamptz", "timestamp", "interval", '"char"', "int2[]", "text[]", "name[]", "oid[]",
    "uuid[]", "int4[]", "varchar[]", "aclitem[]", "int2vector", "bpchar",
)  # fmt: skip
OPERATORS = ("=", "<>", "<", ">", "<=", ">=", "+", "-", "/", "*", "||", "~", "~~", "&")
ROOT = Path(__file__).parents[2]
PLANT = """
    DO $plant$
    DECLARE
        types CONSTANT text[] := %(types)s;
        names CONSTANT text[] := %(names)s;
        operators CONSTANT text[] := %(operators)s;
        a text; b text; n text;
    BEGIN
        FOREACH a IN ARRAY types LOOP
            FOREACH n IN ARRAY names LOOP
                EXECUTE format('CREATE OR REPLACE FUNCTION public.%%I(%%s) RETURNS %%s LANGUAGE plpgsql AS
                    ''BEGIN RAISE EXCEPTION ''''planted: %%s(%%s)''''; END''', n, a, a, n, replace(a, '"', ''));
            END LOOP;
            FOREACH b IN ARRAY types LOOP
                EXECUTE format('CREATE OR REPLACE FUNCTION public.planted(%%s, %%s) RETURNS bool LANGUAGE plpgsql AS
                    ''BEGIN RAISE EXCEPTION ''''planted: %%s, %%s''''; END''', a, b, replace(a, '"', ''), replace(b, '"', ''));
                FOREACH n IN ARRAY operators LOOP
                    BEGIN
                        EXECUTE format('CREATE OPERATOR public.%%s (LEFTARG = %%s, RIGHTARG = %%s, FUNCTION = public.planted)', n, a, b);
                    EXCEPTION WHEN OTHERS THEN NULL;
                    END;
                END LOOP;
                FOREACH n IN ARRAY ARRAY['format', 'set_config', 'to_regclass', 'generate_series', 'date_trunc',
                    'has_table_privilege', 'pg_has_role', 'substring', 'current_setting', 'left', 'aclexplode', 'coalesce'] LOOP
                    EXECUTE format('CREATE OR REPLACE FUNCTION public.%%I(%%s, %%s) RETURNS %%s LANGUAGE plpgsql AS
                        ''BEGIN RAISE EXCEPTION ''''planted: %%s''''; END''', n, a, b, a, n);
                END LOOP;
            END LOOP;
        END LOOP;
    END
    $plant$
"""


def called(text: str) -> set[str]:
    """Return the names that look like function calls."""
    return set(re.findall(r"\b([a-z_]+)\(", text)) - {"exists", "in", "values", "any", "varchar"}


SCRIPTS = [resources.files("loader") / name for name in ("schema.sql", "role.sql", "reader.sql")]
NAMES = {name for script in SCRIPTS for name in called(script.read_text()) if not name.startswith("analytics_")} | {
    "count", "max", "min", "sum", "avg", "unnest", "extract", "now", "clock_timestamp", "current_database",
}  # fmt: skip


def new_role(connection: Connection) -> str:
    """Create a role that is never dropped: one transaction does not have enough locks for all its objects."""
    name = f"mallory_{uuid.uuid4().hex}"
    connection.execute(f"CREATE ROLE {name} LOGIN".encode())
    return name


QUESTIONS = (
    "trend", "trend --bucket week x", "active", "lifecycle", "retention", "funnel x y", "sessions",
    "sessions --gap 30m", "requests", "anomalies", "interactions", f"user {uuid.UUID(int=1)}",
)  # fmt: skip


@pytest.fixture
def planted(one_connection: Connection) -> Connection:
    """Yield the owner's connection to a database without our tables, in which mallory has planted objects."""
    one_connection.execute(
        "DROP TABLE analytics_events, analytics_metrics, analytics_loads, analytics_schema, analytics_settings CASCADE"
    )
    mallory_name = new_role(one_connection)
    one_connection.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    one_connection.commit()
    with psycopg.connect(one_connection.info.dsn, user=mallory_name) as mallory:
        values = {
            "types": psycopg.sql.Literal(list(TYPES)), "names": psycopg.sql.Literal(sorted(NAMES)),
            "operators": psycopg.sql.Literal(list(OPERATORS)),
        }  # fmt: skip
        mallory.execute("SET check_function_bodies = off")
        text = PLANT
        for name, literal in values.items():
            text = text.replace(f"%({name})s", literal.as_string(mallory) + "::pg_catalog.text[]")
        mallory.execute(text.replace("%%", "%").encode())
    return one_connection


def test_a_planted_operator_is_found_by_a_name_that_is_not_qualified(planted: Connection) -> None:
    """Verify that the attack works without qualified names."""
    with pytest.raises(psycopg.errors.RaiseException, match="planted"):
        planted.execute("SELECT 'a'::varchar = 'a'")


def test_no_statement_of_the_loader_calls_what_was_planted(cli: Cli, planted: Connection) -> None:
    owner = cli.owner()
    planted.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (id uuid PRIMARY KEY)")
    planted.execute("CREATE TABLE family_units (id uuid PRIMARY KEY)")
    planted.commit()
    assert "Warning" not in owner("init", "--role", ROLE, "--reader", "analytics_reader")
    assert "Warning" not in owner("init", "--no-foreign-keys")
    assert "Warning" not in owner("init", "--role", ROLE)
    planted.execute(
        "DROP TABLE analytics_schema, analytics_settings CASCADE; DROP INDEX analytics_loads_loaded_at"
    )
    planted.commit()
    assert "upgraded from version 1" in owner("init", "--role", ROLE)
    segment(cli.spool, 1, event(1), metric(1), b"{broken")
    assert "planted" not in owner("doctor")
    assert "creators" in owner("doctor") and "PUBLIC may create objects" in owner("doctor")
    owner("status")
    assert "planted" not in owner("prune", "--older-than", "1d")


def test_rows_that_were_loaded_are_pruned_and_read_without_what_was_planted(
    cli: Cli, planted: Connection
) -> None:
    owner = cli.owner()
    owner("init", "--role", ROLE)
    planted.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) SELECT "
        "pg_catalog.gen_random_uuid(), 'x', '2020-01-01', pg_catalog.gen_random_uuid(), pg_catalog.gen_random_uuid() "
        "FROM pg_catalog.generate_series(1, 10)"
    )
    planted.execute(
        "SELECT * FROM analytics_events_daily; SELECT * FROM analytics_metrics_hourly; SELECT * FROM analytics_missing_segments"
    )
    planted.commit()
    for question in QUESTIONS:
        owner("ask", *question.split(), "--since", "2019-12-01")
    owner("report")
    owner("rollup", "--rebuild")
    assert "match" in owner("rollup", "--verify")
    for form in ("ndjson", "csv", "parquet"):
        owner("export", str(cli.spool.parent / f"events.{form}"))
    assert "events 10" in owner("prune", "--older-than", "1d")
    assert number(planted, "SELECT pg_catalog.count(*) FROM analytics_events") == 0


def test_psql_applies_the_schema_without_what_was_planted(planted: Connection) -> None:
    psql = ["psql", "-v", "ON_ERROR_STOP=1", "-q", "-f", str(ROOT / "schema.sql"),
            f"host={planted.info.host} user=postgres dbname={planted.info.dbname}"]  # fmt: skip
    for command in (psql, [*psql, "-1"], psql):
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    assert schema.schema_version(planted) == 5


@pytest.mark.parametrize(
    "table", ["analytics_schema", "analytics_loads", "analytics_events", "analytics_settings"]
)
@pytest.mark.parametrize("kind", ["trigger", "view"])
def test_a_planted_table_is_refused_before_it_is_used(
    cli: Cli, one_connection: Connection, table: str, kind: str
) -> None:
    one_connection.execute(
        "DROP TABLE analytics_events, analytics_metrics, analytics_loads, analytics_schema, analytics_settings CASCADE"
    )
    mallory_name = new_role(one_connection)
    one_connection.execute(f"GRANT CREATE ON SCHEMA public TO {mallory_name}".encode())
    one_connection.commit()
    with psycopg.connect(one_connection.info.dsn, user=mallory_name) as mallory:
        for name, returns, value in (("evil", "trigger", "NEW"), ("viewed", "int", "1")):
            body = f"BEGIN ALTER ROLE {mallory_name} SUPERUSER; RETURN {value}; END"
            mallory.execute(
                f"CREATE FUNCTION {name}() RETURNS {returns} LANGUAGE plpgsql AS '{body}'".encode()
            )
        if kind == "view":
            mallory.execute(
                f"CREATE VIEW {table} AS SELECT viewed() AS version, 'foreign_keys' AS name, 'on' AS value".encode()
            )
        else:
            mallory.execute(
                f"CREATE TABLE {table} (version INT PRIMARY KEY, name TEXT UNIQUE, value TEXT, "
                "applied_at TIMESTAMPTZ, CHECK (viewed() = 1))".encode()
            )
            mallory.execute(
                f"CREATE TRIGGER evil BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION evil()".encode()
            )
    assert "Error: " in cli.owner()("init", code=1)
    cli.owner()("doctor", code=1)
    rises = f"SELECT count(*) FROM pg_roles WHERE rolname = '{mallory_name}' AND rolsuper"
    assert number(one_connection, rises) == 0
