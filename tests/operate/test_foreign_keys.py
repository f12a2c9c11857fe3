"""Foreign keys: the choice is remembered, no session waits long for them, and an impossible key stops nothing."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from loader.load import schema
from loader.load.database import Connection
from tests.load.lines import ID, event, number, rows, segment
from tests.processes import LOADER, Cli, eventually

KEYS = (
    "SELECT confrelid::regclass::text, convalidated FROM pg_constraint "
    "WHERE contype = 'f' AND conrelid = 'analytics_events'::regclass ORDER BY 1"
)
USERS = "CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY)"
FAMILIES = "CREATE TABLE family_units (id UUID PRIMARY KEY)"
BOTH = [("auth.users", True), ("family_units", True)]


@pytest.fixture
def application(one_connection: Connection) -> Connection:
    one_connection.execute(f"{USERS}; {FAMILIES}")
    one_connection.commit()
    return one_connection


@contextmanager
def locked(connection: Connection, table: str) -> Iterator[None]:
    """Run another session that keeps the table locked by an update during the block."""
    with psycopg.connect(connection.info.dsn) as other:
        other.execute(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE".encode())
        yield


def test_the_choice_is_remembered_and_printed(cli: Cli, application: Connection) -> None:
    owner = cli.owner()
    assert "Foreign keys: on" in owner("init") and rows(application, KEYS) == BOTH
    assert "Foreign keys: off" in owner("init", "--no-foreign-keys") and rows(application, KEYS) == []
    assert "Foreign keys: off" in owner("init") and rows(application, KEYS) == []
    assert json.loads(owner("init", "--json"))["foreign_keys"] == "off"
    printed = owner("init", "--foreign-keys")
    assert "Foreign keys: on" in printed and 'added the foreign key from "user_id" to auth.users' in printed
    assert rows(application, KEYS) == BOTH
    assert "added" not in owner("init") and rows(application, KEYS) == BOTH
    with psycopg.connect(cli.dsn) as loader:
        assert loader.execute("SELECT name, value FROM analytics_settings").fetchall() == [
            ("foreign_keys", "on")
        ]


def test_a_parent_that_is_created_later_is_referred_to_by_the_next_init(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute(USERS)
    one_connection.commit()
    cli.owner()("init")
    assert rows(one_connection, KEYS) == [("auth.users", True)]
    one_connection.execute(FAMILIES)
    one_connection.commit()
    cli.owner()("init")
    assert rows(one_connection, KEYS) == BOTH


@pytest.mark.parametrize("keys", [True, False])
def test_tables_of_a_version_that_remembered_nothing_keep_the_keys_that_they_have(
    application: Connection, keys: bool
) -> None:
    schema.apply_schema(application, foreign_keys=keys)
    application.execute("DROP TABLE analytics_settings CASCADE; UPDATE analytics_schema SET version = 2")
    application.commit()
    applied = schema.apply_schema(application)
    assert (applied.before, applied.version) == (2, schema.SCHEMA_VERSION)
    assert applied.foreign_keys == ("on" if keys else "off")
    assert rows(application, KEYS) == (BOTH if keys else [])


IMPOSSIBLE = {
    "a view": (f"{USERS}; CREATE VIEW family_units AS SELECT id FROM auth.users", "not a table"),
    "bigint ids": (f"{USERS}; CREATE TABLE family_units (id BIGINT PRIMARY KEY)", "has the type bigint, not uuid"),
    "no id": (f"{USERS}; CREATE TABLE family_units (uuid UUID PRIMARY KEY)", "has the type none, not uuid"),
    "no unique id": (f"{USERS}; CREATE TABLE family_units (id UUID)", "no unique constraint"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_key_that_cannot_be_created_is_a_warning_and_the_rest_is_applied(
    cli: Cli, one_connection: Connection, case: str
) -> None:
    statement, reason = IMPOSSIBLE[case]
    one_connection.execute("DROP INDEX analytics_loads_loaded_at; DROP TABLE analytics_schema")
    one_connection.execute(statement.encode())
    one_connection.commit()
    printed = cli.owner()("init", "--foreign-keys")
    assert "upgraded from version 1" in printed and reason in printed
    assert "Warning: could not add the foreign key" in printed
    assert rows(one_connection, KEYS) == [("auth.users", True)]
    assert (
        number(one_connection, "SELECT count(*) FROM pg_class WHERE relname = 'analytics_loads_loaded_at'")
        == 1
    )


def test_rows_without_their_parent_leave_a_key_for_new_rows(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, event(1))
    cli("run", "--once")
    one_connection.execute(f"{USERS}; {FAMILIES}; INSERT INTO family_units VALUES ('{ID}')".encode())
    one_connection.commit()
    printed = cli.owner()("init")
    assert "applies to new rows only" in printed and "violates foreign key constraint" in printed
    assert rows(one_connection, KEYS) == [("auth.users", False), ("family_units", True)]
    one_connection.execute(f"INSERT INTO auth.users VALUES ('{ID}')".encode())
    one_connection.commit()
    cli.owner()("init")
    assert rows(one_connection, KEYS) == BOTH


def test_a_missing_privilege_on_a_parent_is_a_warning(one_server: str, application: Connection) -> None:
    application.execute("CREATE ROLE weak_owner LOGIN")
    application.execute("CREATE SCHEMA mine AUTHORIZATION weak_owner")
    application.commit()
    with (
        psycopg.connect(
            application.info.dsn, user="weak_owner", options="-c search_path=mine,public"
        ) as weak,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        schema.apply_schema(weak)
    with psycopg.connect(application.info.dsn, user="weak_owner", options="-c search_path=mine") as weak:
        applied = schema.apply_schema(weak)
    assert any("permission denied" in warning for warning in applied.warnings), applied
    application.execute("DROP OWNED BY weak_owner CASCADE; DROP ROLE weak_owner")
    application.commit()


@pytest.mark.parametrize("parent", ["auth.users", "family_units"])
def test_init_lets_the_application_write_while_it_waits_for_a_lock(
    cli: Cli, application: Connection, parent: str
) -> None:
    """A requested lock blocks all later requests, so each wait must be short; init then continues."""
    with locked(application, parent):
        init = subprocess.Popen([*LOADER, "init"], env=cli.owner().environment, stdout=subprocess.PIPE)
        waiting = f"SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '{parent}'::regclass"
        eventually(lambda: number(application, waiting))
        for _ in range(3):  # writes that queue behind the request, each longer than an attempt
            begun = time.monotonic()
            application.execute(f"INSERT INTO {parent} VALUES (gen_random_uuid())".encode())
            application.commit()
            assert time.monotonic() - begun < 5
        assert init.poll() is None
    assert init.wait(timeout=30) == 0
    assert rows(application, KEYS) == BOTH


def test_a_lock_that_nobody_releases_is_given_up_with_a_warning(application: Connection) -> None:
    with locked(application, "auth.users"):
        applied = schema.apply_schema(application, patience=2.0)
    assert any("lock timeout" in warning for warning in applied.warnings)
    assert rows(application, KEYS) == [("family_units", True)]


def test_applying_again_needs_no_lock_that_a_load_holds(application: Connection) -> None:
    schema.apply_schema(application)
    with locked(application, "analytics_events"), locked(application, "analytics_loads"):
        assert schema.apply_schema(application, patience=0.0).warnings == []


def test_loading_continues_while_a_key_is_validated(application: Connection) -> None:
    """VALIDATE CONSTRAINT does not conflict with writers, unlike ADD FOREIGN KEY."""
    application.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
        "SELECT gen_random_uuid(), 'x', now(), gen_random_uuid(), gen_random_uuid() FROM generate_series(1, 300000)"
    )
    application.execute(
        "INSERT INTO auth.users SELECT user_id FROM analytics_events; "
        "INSERT INTO family_units SELECT family_unit_id FROM analytics_events"
    )
    application.commit()
    longest, done = 0.0, threading.Event()

    def write() -> None:
        nonlocal longest
        with psycopg.connect(application.info.dsn, autocommit=True) as other:
            while not done.is_set():
                begun = time.monotonic()
                other.execute("INSERT INTO auth.users VALUES (gen_random_uuid())")
                longest = max(longest, time.monotonic() - begun)

    writer = threading.Thread(target=write)
    writer.start()
    begun = time.monotonic()
    schema.apply_schema(application)
    took = time.monotonic() - begun
    done.set()
    writer.join()
    assert rows(application, KEYS) == BOTH
    assert longest < max(took / 2, 0.2), (longest, took)
