"""Tables created by other tools: differences that would corrupt rows are refused, others are reported."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest

from loader.errors import LoaderError
from loader.load import deviations, schema
from loader.load.database import Connection
from tests.load.lines import event, metric, number, segment
from tests.operate.test_doctor import examined
from tests.processes import Cli
from tests.servers import DROP_QUESTIONS, ROLE
from tests.thinned import one_in

EVENTS = """
    CREATE TABLE analytics_events (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), event_id UUID UNIQUE NOT NULL, event_type VARCHAR(100) NOT NULL,
        timestamp TIMESTAMPTZ NOT NULL, user_id UUID NOT NULL, family_unit_id UUID NOT NULL, session_id UUID,
        metadata JSONB NOT NULL DEFAULT '{}', created_at TIMESTAMPTZ DEFAULT now())
"""
METRICS = """
    CREATE TABLE analytics_metrics (
        id UUID PRIMARY KEY DEFAULT gen_random_uuid(), metric_name VARCHAR(100) NOT NULL,
        metric_type VARCHAR(50) NOT NULL, value NUMERIC NOT NULL, labels JSONB DEFAULT '{}',
        timestamp TIMESTAMPTZ NOT NULL, created_at TIMESTAMPTZ DEFAULT now())
"""
ALL_TABLES = "analytics_events, analytics_metrics, analytics_loads, analytics_schema, analytics_settings"
PARTITIONED = (
    (
        "id UUID PRIMARY KEY DEFAULT gen_random_uuid(), event_id UUID UNIQUE NOT NULL",
        "id UUID, event_id UUID NOT NULL",
    ),
    ("DEFAULT now())", "DEFAULT now(), UNIQUE (event_id, timestamp)) PARTITION BY RANGE (timestamp)"),
)

REFUSED: dict[str, tuple[tuple[tuple[str, str], ...], str]] = {
    "json": ((("metadata JSONB", "metadata JSON"),), 'column "metadata" of the type json, not jsonb'),
    "text": ((("metadata JSONB", "metadata TEXT"),), '"metadata" of the type text, not jsonb'),
    "labels as json": ((("labels JSONB", "labels JSON"),), '"analytics_metrics" has the column "labels"'),
    "varchar ids": ((("event_id UUID", "event_id VARCHAR(36)"),), '"event_id" of the type character varying(36)'),
    "char ids": ((("event_id UUID", "event_id CHAR(36)"),), '"event_id" of the type character(36), not uuid'),
    "char user ids": ((("user_id UUID", "user_id CHAR(36)"),), '"user_id" of the type character(36), not uuid'),
    "bigint user ids": ((("user_id UUID", "user_id BIGINT"),), "analytics_events_old"),
    "ids with a default of text": (
        (("id UUID PRIMARY KEY DEFAULT gen_random_uuid()", "id VARCHAR(36) PRIMARY KEY DEFAULT gen_random_uuid()::text"),),
        '"id" of the type character varying(36)',
    ),
    "local times": ((("timestamp TIMESTAMPTZ", "timestamp TIMESTAMP"),), "without time zone, not timestamptz"),
    "whole seconds": ((("timestamp TIMESTAMPTZ", "timestamp TIMESTAMPTZ(0)"),), "timestamp(0) with time zone"),
    "dates": ((("timestamp TIMESTAMPTZ", "timestamp DATE"),), "of the type date, not timestamptz"),
    "whole values": ((("value NUMERIC", "value INT"),), '"value" of the type integer, not numeric'),
    "float values": ((("value NUMERIC", "value DOUBLE PRECISION"),), "double precision, not numeric"),
    "rounded values": ((("value NUMERIC", "value NUMERIC(10,2)"),), "numeric(10,2), not numeric"),
    "a domain that rounds": ((("value NUMERIC", "value two_places"),), "two_places, not numeric"),
    "padded names": ((("event_type VARCHAR(100)", "event_type CHAR(100)"),), "character(100), not varchar(100)"),
    "no uniqueness": ((("event_id UUID UNIQUE", "event_id UUID"),), 'does not ensure that "event_id" is unique'),
    "partly unique": (
        (("event_id UUID UNIQUE", "event_id UUID"), ("'{}', created", "'{}', UNIQUE (event_id, timestamp), created")),
        'does not ensure that "event_id" is unique',
    ),
    "late uniqueness": ((("event_id UUID UNIQUE", "event_id UUID UNIQUE DEFERRABLE"),), "is deferrable"),
    "late primary key": ((("id UUID PRIMARY KEY", "id UUID PRIMARY KEY DEFERRABLE"),), "is deferrable"),
    "metrics without a key": ((("id UUID PRIMARY KEY", "id UUID"),), 'does not ensure that "id" is unique'),
    "partitioned": (PARTITIONED, "partitioned by another column"),
    "a missing column": ((("session_id UUID,", ""),), 'lacks the column "session_id"'),
    "computed": (
        (("session_id UUID,", "session_id UUID GENERATED ALWAYS AS (user_id) STORED,"),), 'computes the column "session_id"',
    ),
}  # fmt: skip


@pytest.fixture
def owner(one_connection: Connection) -> Connection:
    """Yield the owner's connection to a database without our tables."""
    one_connection.execute(f"DROP TABLE {ALL_TABLES} CASCADE".encode())
    one_connection.execute("CREATE DOMAIN two_places AS NUMERIC(10,2)")
    one_connection.commit()
    return one_connection


def create(connection: Connection, changes: tuple[tuple[str, str], ...]) -> None:
    for table in (EVENTS, METRICS):
        for old, new in changes:
            table = (
                table.replace(old, new) if "analytics_events" in table or changes != PARTITIONED else table
            )
        connection.execute(table.encode())
    connection.commit()


def statements(text: str) -> Iterator[str]:
    """Return the SQL in a message."""
    for found in re.findall(r"((?:ALTER|DROP|REINDEX) [^;]*;)", text):
        yield found


@pytest.mark.parametrize("case", one_in(2, REFUSED))
def test_tables_that_would_hold_wrong_rows_are_refused_with_the_statement_that_corrects_them(
    cli: Cli, owner: Connection, case: str
) -> None:
    changes, words = REFUSED[case]
    create(owner, changes)
    printed = cli.owner()("init", code=1)
    assert words in printed and printed.count("\n") == 1, printed
    assert number(owner, "SELECT count(*) FROM pg_class WHERE relname = 'analytics_loads'") == 0
    for statement in statements(printed):
        owner.execute(statement.encode())
    owner.commit()
    cli.owner()("init", "--role", ROLE)
    segment(cli.spool, 1, event(1), event(2), metric(1, value=1.23456789))
    segment(cli.spool, 2, event(1), event(3), metric(1, value=1.23456789))
    printed = cli("run", "--once")
    assert "events 3, metrics 1, duplicates 2, rejected 0" in printed
    assert number(owner, "SELECT count(*) FROM analytics_metrics WHERE value = 1.23456789") == 1


@pytest.mark.parametrize("case", one_in(4, REFUSED))
def test_the_doctor_names_what_init_refuses(cli: Cli, owner: Connection, case: str) -> None:
    changes, words = REFUSED[case]
    schema.apply_schema(owner, role=ROLE)
    owner.execute("DROP TABLE analytics_events, analytics_metrics CASCADE")
    create(owner, changes)
    owner.execute(f"GRANT SELECT, INSERT ON analytics_events, analytics_metrics TO {ROLE}".encode())
    owner.commit()
    findings = examined(cli, code=1)
    assert findings["tables"]["verdict"] == "failed"
    assert words in findings["tables"]["finding"] + findings["tables"]["remedy"]


WARNED = {
    "a column that is required": ("ALTER TABLE analytics_events ADD tenant TEXT NOT NULL", "failed", '"tenant"'),
    "a required domain": (
        "CREATE DOMAIN tenant AS TEXT NOT NULL; ALTER TABLE analytics_metrics ADD tenant TENANT", "failed", '"tenant"',
    ),
    "a required session": ("ALTER TABLE analytics_events ALTER session_id SET NOT NULL", "warning", '"session_id"'),
    "row-level security": ("ALTER TABLE analytics_events ENABLE ROW LEVEL SECURITY", "failed", "row-level security"),
    "unlogged": ("ALTER TABLE analytics_metrics SET UNLOGGED", "warning", "SET LOGGED"),
    "a trigger": (
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER "
        "quiet BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION nothing()", "warning", '"quiet"',
    ),
    "a rule": (
        "CREATE RULE elsewhere AS ON INSERT TO analytics_events DO INSTEAD NOTHING", "failed", '"elsewhere"',
    ),
    "no vacuum": ("ALTER TABLE analytics_events SET (autovacuum_enabled = off)", "warning", "RESET (autovacuum_enabled)"),
    "a narrow column": (
        f"DROP VIEW analytics_events_daily; {DROP_QUESTIONS}ALTER TABLE analytics_events ALTER event_type TYPE VARCHAR(20)",
        "warning", "character varying(20)",
    ),
    "a domain": (
        f"CREATE DOMAIN tag AS JSONB CHECK (VALUE <> '7'); {DROP_QUESTIONS}ALTER TABLE analytics_events ALTER metadata TYPE tag",
        "warning", "domain tag",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", one_in(2, WARNED))
def test_what_may_stop_rows_is_warned_of_by_init_and_doctor_with_the_statement_that_helps(
    cli: Cli, one_connection: Connection, case: str
) -> None:
    statement, verdict, words = WARNED[case]
    one_connection.execute(statement.encode())
    one_connection.commit()
    printed = cli.owner()("init")
    assert words in printed and "Warning: " in printed
    finding = examined(cli, code=int(verdict == "failed"))["tables"]
    assert finding["verdict"] == verdict and words in finding["finding"] + finding["remedy"]
    for correction in statements(printed.partition("; or ")[0] + ";"):
        one_connection.execute(correction.encode())
    one_connection.commit()
    assert "Warning: " not in cli.owner()("init")


@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_in_the_place_of_a_table_is_refused(cli: Cli, owner: Connection, kind: str) -> None:
    owner.execute(EVENTS.replace("analytics_events", "mine").encode())
    owner.execute(f"CREATE {kind} analytics_events AS SELECT * FROM mine".encode())
    owner.commit()
    printed = cli.owner()("init", code=1)
    assert "is not a table" in printed and f"ALTER {kind}" in printed


def test_the_tables_of_the_schema_deviate_in_nothing(connection: Connection) -> None:
    assert deviations.find(connection) == []


def test_missing_uniqueness_is_found_in_an_index_that_failed(owner: Connection) -> None:
    owner.execute(EVENTS.replace("event_id UUID UNIQUE", "event_id UUID").encode())
    for _ in range(2):
        owner.execute(
            "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) SELECT "
            "'0190163d-8694-739b-aea5-966c26f8ad91', 'x', now(), gen_random_uuid(), gen_random_uuid()"
        )
    owner.commit()
    with (
        psycopg.connect(owner.info.dsn, autocommit=True) as other,
        pytest.raises(psycopg.errors.UniqueViolation),
    ):
        other.execute("CREATE UNIQUE INDEX CONCURRENTLY broken ON analytics_events (event_id)")
    with pytest.raises(LoaderError, match="REINDEX INDEX CONCURRENTLY broken"):
        schema.apply_schema(owner)
