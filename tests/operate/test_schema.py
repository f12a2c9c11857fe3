"""The tables change version without a hand on the loader, and its role may load and nothing else."""

from __future__ import annotations

import subprocess

import psycopg
import pytest

from loader.load.database import Connection
from tests.load.lines import event, number, segment
from tests.processes import LOADER, Cli
from tests.servers import database

EVENTS = "SELECT count(*) FROM analytics_events"


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (1, "older than this loader's 5: run `loader init`"),
        (9, "newer than this loader's 5: upgrade the loader"),
    ],
)
def test_tables_of_another_version_are_told_and_loaded_into(
    cli: Cli, one_connection: Connection, version: int, words: str
) -> None:
    if version == 1:  # which wrote no version down
        one_connection.execute("DROP TABLE analytics_schema; DROP INDEX analytics_loads_loaded_at")
    else:
        one_connection.execute("INSERT INTO analytics_schema (version) VALUES (9)")
    one_connection.commit()
    segment(cli.spool, 1, event(1))
    printed = cli("run", "--once")
    assert words in printed and "events 1" in printed
    if version == 1:
        assert "version 5, upgraded from version 1" in cli.owner()("init", "--role", "analytics_loader")
        assert "schema version" not in cli("run", "--once")
    else:
        assert "newer than version 5" in cli.owner()("init", code=1)
    assert number(one_connection, EVENTS) == 1


def test_the_role_gets_what_a_strict_database_took_from_everybody(
    cli: Cli, one_connection: Connection
) -> None:
    name = one_connection.info.dbname
    one_connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC".encode())
    one_connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    one_connection.execute(f"GRANT CONNECT ON DATABASE {name} TO analytics_loader".encode())
    one_connection.commit()
    cli.owner()("init", "--role", "analytics_loader")
    segment(cli.spool, 1, *[event(n) for n in range(10)])
    cli("run", "--once")
    segment(cli.spool, 2, *[event(n) for n in range(12)])  # most are there, and are compared
    assert "events 2, metrics 0, duplicates 10" in cli("run", "--once")


def test_two_that_apply_the_schema_at_once_do_not_disturb_each_other(one_server: str) -> None:
    with database(one_server, template="template0") as dsn:
        applying = [subprocess.Popen([*LOADER, "init", "--dsn", dsn]) for _ in range(6)]
        assert [process.wait() for process in applying] == [0] * 6


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE analytics_events SET metadata = '{}'",
        "DELETE FROM analytics_metrics",
        "TRUNCATE analytics_loads",
        "INSERT INTO analytics_schema (version) VALUES (4)",
        "DROP TABLE analytics_events",
        "ALTER TABLE analytics_loads DROP CONSTRAINT every_line_is_accounted_for",
        "CREATE TABLE mine (n INT)",
        "CREATE ROLE friend",
        "SELECT * FROM analytics_events_daily",
    ],
)
def test_the_role_may_do_nothing_but_load(cli: Cli, statement: str) -> None:
    with (
        psycopg.connect(cli.dsn) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())
