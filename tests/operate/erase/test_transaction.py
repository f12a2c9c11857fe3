"""An erasure in the application's own transaction, concurrently with loads, in every order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from loader.load import batch, erasures, lowwater, schema
from loader.load.counts import Counts
from loader.load.database import Connection, connect, transaction
from loader.load.insert import insert
from tests.load.lines import chunk, metric, number, rows, segment, wait_for_events
from tests.operate.erase import story
from tests.operate.erase.story import ANNA, BERT, HOME, OTHER_HOME, of
from tests.processes import Cli, eventually
from tests.servers import ROLE

EVENTS = "SELECT count(*) FROM analytics_events WHERE user_id = '{}'"
ERASE = f"SELECT analytics_erase_user('{ANNA}')"
PARENTS = (
    "CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY); CREATE TABLE family_units (id UUID PRIMARY KEY);"
    f"INSERT INTO auth.users VALUES ('{ANNA}'), ('{BERT}'); INSERT INTO family_units VALUES ('{HOME}'), ('{OTHER_HOME}')"
)


APPLICATION = f"application_{os.getpid()}"
"""Roles belong to the server, which all workers of pytest-xdist share."""


@pytest.fixture
def application(one_connection: Connection) -> Iterator[Connection]:
    """A connection of the application, whose role may erase, and delete its own users."""
    one_connection.execute(PARENTS.encode())
    one_connection.commit()
    schema.apply_schema(one_connection)
    one_connection.execute(f"DROP ROLE IF EXISTS {APPLICATION}".encode())
    one_connection.execute(f"CREATE ROLE {APPLICATION} LOGIN".encode())
    one_connection.execute(
        f"GRANT USAGE ON SCHEMA auth TO {APPLICATION}; GRANT SELECT, DELETE ON auth.users TO {APPLICATION}".encode()
    )
    one_connection.execute(
        f"GRANT EXECUTE ON FUNCTION analytics_erase_user, analytics_erase_family TO {APPLICATION}".encode()
    )
    one_connection.commit()
    with psycopg.connect(one_connection.info.dsn, user=APPLICATION) as connection:
        yield connection
        connection.rollback()
    one_connection.execute(f"DROP OWNED BY {APPLICATION}".encode())
    one_connection.execute(f"DROP ROLE {APPLICATION}".encode())
    one_connection.commit()


def test_an_account_is_deleted_in_one_transaction_with_its_events(
    cli: Cli, one_connection: Connection, application: Connection
) -> None:
    segment(cli.spool, 1, of(ANNA, 1), of(BERT, 2), *story.mentioning(ANNA, 100))
    cli("run", "--once")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        application.execute(f"DELETE FROM auth.users WHERE id = '{ANNA}'".encode())
    application.rollback()
    for end in (application.rollback, application.commit):
        ((counts,),) = application.execute(ERASE.encode()).fetchall()
        assert counts == {"events": 1, "metrics": 0, "user_days": 0, "mentions": 16}
        application.execute(f"DELETE FROM auth.users WHERE id = '{ANNA}'".encode())
        end()
        gone = end == application.commit
        assert number(one_connection, EVENTS.format(ANNA)) == (not gone)
        assert number(one_connection, "SELECT count(*) FROM analytics_erasures") == gone
    assert story.found_in_tables(one_connection, ANNA) == []
    segment(cli.spool, 2, of(ANNA, 3), of(ANNA, 1), of(BERT, 4), *story.mentioning(ANNA, 100))
    assert "events 1, metrics 0, duplicates 16, rejected 0, erased 2" in cli("run", "--once")
    story.balanced(one_connection)


def run(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(statement.encode())


def waits_for_erasure(connection: Connection) -> bool:
    """Whether a session waits for the lock of the tombstones."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"
    return number(connection, waiting) == 1


def test_a_load_that_began_before_the_erasure_is_waited_for(one_connection: Connection) -> None:
    erasing = threading.Thread(target=run, args=[one_connection.info.dsn, ERASE])
    with connect(one_connection.info.dsn) as loading:
        with transaction(loading):
            seen = erasures.current(loading)
            erasing.start()
            eventually(lambda: waits_for_erasure(one_connection))
            insert(loading, [chunk(of(ANNA, 1), of(BERT, 2))], 0.0, seen, lowwater.NONE)
        erasing.join()
    assert rows(one_connection, "SELECT user_id FROM analytics_events") == [(BERT,)]


@pytest.mark.parametrize("commits", [True, False])
def test_a_load_that_begins_during_the_erasure_waits_for_it(
    one_connection: Connection, tmp_path: Path, commits: bool
) -> None:
    def load() -> None:
        with connect(one_connection.info.dsn) as loading:
            counts.append(batch.load(loading, [chunk(of(ANNA, 1), of(BERT, 2))], tmp_path).counts)

    counts: list[Counts] = []
    loading = threading.Thread(target=load)
    with psycopg.connect(one_connection.info.dsn) as erasing:
        erasing.execute(ERASE.encode())
        loading.start()
        eventually(lambda: waits_for_erasure(one_connection))
        erasing.commit() if commits else erasing.rollback()
        loading.join()
    assert counts == [Counts(events=1, erased=1) if commits else Counts(events=2)]
    assert number(one_connection, EVENTS.format(ANNA)) == (not commits)


@pytest.mark.long
def test_a_loader_that_runs_finds_an_erasure_between_two_loads(
    cli: Cli, one_connection: Connection, application: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    with cli.daemon("--archive", str(archive)):
        for n in range(1, 20):
            segment(
                cli.spool,
                n,
                of(ANNA, 2 * n),
                of(BERT, 2 * n + 1),
                of(BERT, 1000 + n, metadata={"a": str(ANNA)})[:-1],
            )
            if n == 10:
                application.execute(ERASE.encode())
                application.execute(f"DELETE FROM auth.users WHERE id = '{ANNA}'".encode())
                application.commit()
        wait_for_events(one_connection, 19)
        eventually(lambda: len(list(archive.rglob("*.zst"))) == 19)
        eventually(lambda: (cli.spool / ".erasures").exists())
        eventually(lambda: story.found_in_files(ANNA, cli.spool, archive) == [])
    assert story.found_in_tables(one_connection, ANNA) == []
    assert number(one_connection, EVENTS.format(BERT)) == 19
    assert story.counted(one_connection, "erased") >= 19
    story.balanced(one_connection)


def test_files_follow_when_a_loader_runs_next(
    cli: Cli, one_connection: Connection, application: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    segment(cli.spool, 1, of(ANNA, 1), of(ANNA, 2)[:-1], of(BERT, 3, metadata={"x": ANNA.hex})[:-1])
    cli("run", "--once", "--archive", archive, code=3)
    application.execute(ERASE.encode())
    application.commit()
    assert story.found_in_files(ANNA, cli.spool, archive)
    before = {path: path.stat() for path in archive.rglob("*.zst")}
    segment(cli.spool, 2, of(ANNA, 4))
    cli("run", "--once", "--archive", archive)
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    for path, status in before.items():
        now = path.stat()
        assert (now.st_mtime_ns, now.st_mode, now.st_uid) == (
            status.st_mtime_ns,
            status.st_mode,
            status.st_uid,
        )
        assert now.st_ino != status.st_ino
    assert story.counted(one_connection, "erased") == 3
    assert (archive / ".erasures").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_snapshot_that_would_miss_rows_is_refused(one_connection: Connection, isolation: str) -> None:
    one_connection.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
    with pytest.raises(psycopg.errors.RaiseException, match=isolation):
        one_connection.execute(ERASE.encode())


@pytest.mark.parametrize("nobody", ["NULL", "'00000000-0000-0000-0000-000000000000'"])
def test_nobody_cannot_be_erased(one_connection: Connection, nobody: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="without an id"):
        one_connection.execute(f"SELECT analytics_erase_user({nobody})".encode())


@pytest.mark.parametrize(
    "statement",
    [
        ERASE,
        f"SELECT analytics_erase_family('{HOME}')",
        f"SELECT analytics_erase_rows(ARRAY['{ANNA}'::uuid], 'user')",
        f"SELECT analytics_erase_mentions('{ANNA}')",
        "INSERT INTO analytics_erasures (subject, kind) VALUES (sha256(''), 'user')",
        "DELETE FROM analytics_erasures",
        "UPDATE analytics_erasure_keys SET key = sha256('')",
    ],
)
def test_the_loader_may_not_erase(cli: Cli, statement: str) -> None:
    with psycopg.connect(cli.dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_a_role_that_cannot_know_who_was_erased_loads_nothing(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute(f"REVOKE SELECT ON analytics_erasures FROM {ROLE}".encode())
    one_connection.commit()
    segment(cli.spool, 1, of(ANNA, 1))
    assert "permission denied for table analytics_erasures" in cli("run", "--once", code=1)
    assert "lacks SELECT on analytics_erasures" in cli("doctor", code=1)
    cli.owner()("init")
    assert "events 1" in cli("run", "--once")


@pytest.mark.parametrize("table", ["analytics_erasures", "analytics_erasure_keys", "analytics_events"])
def test_whoever_may_erase_reads_nothing(application: Connection, table: str) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        application.execute(f"SELECT * FROM {table}".encode())


def test_a_search_path_of_the_caller_changes_nothing(
    one_connection: Connection, application: Connection
) -> None:
    one_connection.execute(
        f"CREATE SCHEMA mine; GRANT USAGE, CREATE ON SCHEMA mine TO {APPLICATION}; "
        f'GRANT TEMPORARY ON DATABASE "{one_connection.info.dbname}" TO {APPLICATION}'.encode()
    )
    one_connection.commit()
    application.execute(
        "CREATE TEMP TABLE analytics_erasures (subject BYTEA); "
        "CREATE FUNCTION mine.sha256(bytea) RETURNS bytea LANGUAGE sql AS $$ SELECT 1/0, ''::bytea $$"
        .replace("1/0, ", "")
    )  # fmt: skip
    application.execute("SET search_path = mine, pg_temp, public, pg_catalog")
    application.execute(f"SELECT public.analytics_erase_user('{ANNA}')".encode())
    application.commit()
    assert number(one_connection, "SELECT count(*) FROM public.analytics_erasures") == 1
    one_connection.execute("DROP SCHEMA mine CASCADE")
    one_connection.commit()


def test_user_days_and_rollups_follow(cli: Cli, one_connection: Connection) -> None:
    lines = [
        of(ANNA, 1),
        of(BERT, 2),
        metric(3, labels={"who": str(ANNA)}),
        metric(4, labels={"who": str(BERT)}),
    ]
    segment(cli.spool, 1, *lines)
    cli("run", "--once")
    cli.owner()("rollup")
    assert number(one_connection, "SELECT count(*) FROM analytics_user_days") == 2
    one_connection.execute(ERASE.encode())
    one_connection.commit()
    assert rows(one_connection, "SELECT user_id FROM analytics_user_days") == [(BERT,)]
    assert number(one_connection, "SELECT sum(events) FROM analytics_trend('2026-01-20', '2026-01-21')") == 1
    assert story.found_in_tables(one_connection, ANNA) == []
    cli.owner()("rollup")
    assert number(one_connection, "SELECT sum(events) FROM analytics_hourly_events") == 1
    assert (
        number(one_connection, "SELECT count(*) FROM analytics_check_rollups('-infinity', 'infinity')") == 0
    )
    assert story.found_in_tables(one_connection, ANNA) == []


def test_rollups_of_pruned_hours_lose_the_mention(cli: Cli, one_connection: Connection) -> None:
    segment(
        cli.spool, 1, of(ANNA, 1), metric(3, labels={"who": str(ANNA)}), metric(4, labels={"who": str(BERT)})
    )
    cli("run", "--once")
    cli.owner()("rollup")
    cli.owner()("prune", "--older-than", "1d")
    assert story.found_in_tables(one_connection, ANNA) == ["analytics_hourly_metrics", "analytics_user_days"]
    one_connection.execute(ERASE.encode())
    one_connection.commit()
    assert story.found_in_tables(one_connection, ANNA) == []
    assert number(one_connection, "SELECT sum(records) FROM analytics_hourly_metrics") == 2


def test_a_loader_of_version_4_loads_into_the_tables(one_connection: Connection) -> None:
    one_connection.execute(
        "INSERT INTO analytics_loads (digest, file, byte_offset, bytes, lines, events, metrics, duplicates, rejected, "
        "loader_host) VALUES (sha256(''), 'a', 0, 9, 4, 1, 1, 1, 1, 'h')"
    )
    with pytest.raises(psycopg.errors.CheckViolation, match="every_line_is_accounted_for"):
        one_connection.execute("UPDATE analytics_loads SET erased = 1")


def test_tables_of_version_4_are_loaded_into_and_upgraded(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute(
        "DROP VIEW analytics_conservation, analytics_missing_segments; ALTER TABLE analytics_loads DROP COLUMN erased, "
        "DROP COLUMN expired, DROP COLUMN segments, DROP COLUMN digests, DROP COLUMN first_loaded_at; DROP TABLE analytics_erasures, "
        "analytics_erasure_keys; DELETE FROM analytics_schema WHERE version = 5; "
        "INSERT INTO analytics_schema (version) VALUES (4); ALTER TABLE analytics_loads ADD "
        "CONSTRAINT every_line_is_accounted_for CHECK (lines = events + metrics + duplicates + rejected)"
    )
    one_connection.commit()
    segment(cli.spool, 1, of(ANNA, 1), b"{broken")
    assert "events 1" in cli("run", "--once", code=3)
    cli("status")
    assert "run `loader init`" in cli.owner()("erase", "--user", str(ANNA), code=1)
    assert "upgraded from version 4" in cli.owner()("init", "--role", ROLE)
    cli.owner()("erase", "--user", str(ANNA))
    assert story.found_in_tables(one_connection, ANNA) == []
    story.balanced(one_connection)


def test_partitioned_tables_are_erased_from(one_connection: Connection, tmp_path: Path) -> None:
    one_connection.execute(
        "DROP TABLE analytics_events CASCADE; "
        "CREATE TABLE analytics_events (id UUID NOT NULL DEFAULT gen_random_uuid(), event_id UUID PRIMARY KEY, "
        "event_type VARCHAR(100) NOT NULL, timestamp TIMESTAMPTZ NOT NULL, user_id UUID NOT NULL, "
        "family_unit_id UUID NOT NULL, session_id UUID, metadata JSONB NOT NULL DEFAULT '{}', "
        "created_at TIMESTAMPTZ DEFAULT now()) PARTITION BY RANGE (event_id); "
        "CREATE TABLE first PARTITION OF analytics_events FOR VALUES FROM (MINVALUE) TO "
        "('0190163d-8694-739b-aea5-000000000005'); "
        "CREATE TABLE second PARTITION OF analytics_events DEFAULT"
    )
    one_connection.commit()
    with connect(one_connection.info.dsn) as loading:
        lines = [of(who, number) for number, who in enumerate([ANNA, BERT] * 5)] + story.mentioning(ANNA, 100)
        batch.load(loading, [chunk(*lines)], tmp_path)
    one_connection.execute(ERASE.encode())
    one_connection.commit()
    assert (
        number(one_connection, EVENTS.format(ANNA)) == 0 and number(one_connection, EVENTS.format(BERT)) == 14
    )
    assert "0" * 32 in story.plain(str(rows(one_connection, "SELECT * FROM analytics_events")).encode())
