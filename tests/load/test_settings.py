"""No setting of a role, a database or a server changes what a load guarantees."""

from __future__ import annotations

import json
import signal
import subprocess
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from loader.demo import embedded
from loader.files import rejects
from loader.load import database, schema
from loader.load.batch import load, retry
from loader.load.counts import Counts
from loader.load.database import Connection
from loader.load.sqlstate import Action, action, explain
from tests.load.lines import as_owner, chunk, event, is_number, metric, number, rejected, rows, segment
from tests.processes import Cli, eventually
from tests.servers import DROP_QUESTIONS, ROLE, VERSIONS

EVENTS = "SELECT count(*) FROM analytics_events"
SETTINGS = {
    "synchronous_commit": ("off", "on"),
    "statement_timeout": ("50ms", "0"),
    "idle_in_transaction_session_timeout": ("100ms", "0"),
    "lock_timeout": ("1ms", "1min"),
    "default_transaction_isolation": ("serializable", "serializable"),
    "default_transaction_deferrable": ("on", "on"),
    "search_path": ('pg_temp, "$user", elsewhere', "pg_catalog, public, elsewhere, pg_temp"),
    "row_security": ("off", "on"),
    "client_encoding": ("latin1", "UTF8"),
    "datestyle": ("SQL, DMY", "ISO, YMD"),
    "intervalstyle": ("sql_standard", "sql_standard"),
    "timezone": ("Asia/Tokyo", "UTC"),
    "bytea_output": ("escape", "escape"),
    "extra_float_digits": ("-15", "1"),
    "standard_conforming_strings": ("off", "on"),
    "jit": ("on", "off"),
    "jit_above_cost": ("0", "0"),
    "exit_on_error": ("on", "off"),
    "array_nulls": ("off", "off"),
    "quote_all_identifiers": ("on", "off"),
    "default_tablespace": ("pg_default", "pg_default"),
    "temp_buffers": ("100", "800kB"),
    "check_function_bodies": ("off", "off"),
    "plan_cache_mode": ("force_generic_plan", "force_generic_plan"),
    "enable_nestloop": ("off", "off"),
}


def as_role(connection: Connection, settings: dict[str, str]) -> Connection:
    """Return a new connection of a role with these settings in this database."""
    name = sql.Identifier(connection.info.dbname)
    connection.execute("RESET ROLE")
    for setting, value in settings.items():
        words = sql.SQL(value) if setting == "search_path" else sql.Literal(value)
        change = sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}")
        connection.execute(change.format(sql.Identifier(ROLE), name, sql.SQL(setting), words))
    connection.commit()
    connection.execute(f"SET ROLE {ROLE}".encode())
    connection.commit()
    return database.connect(make_conninfo(connection.info.dsn, user=ROLE))


def load_everything(wire: Connection, spool: Path, duplicates: float = 0.0) -> None:
    """Load new rows, duplicates, a collision, rejects of both kinds, known chunks, and a retry."""
    lines = [event(n, metadata={"family": "家族 é", "n": n}) for n in range(9000)]
    broken = [b"{broken \xe5\xae\xb6 %d" % n for n in range(3000)]
    first = chunk(*lines[:6000], metric(1), *broken, file="first.ndjson")
    assert load(wire, [first], spool).counts == Counts(6000, 1, 0, 3000)
    second = chunk(*lines, event(1, metadata={}), metric(1), metric(2).replace(b'1,"l', b'1e200000,"l'))
    assert load(wire, [first], spool).known == 9001
    assert load(wire, [second], spool, duplicates).counts == Counts(3000, 0, 6001, 2)
    for path in rejects.files(spool):
        retry(wire, path)
    assert len(rejected(spool)) == 3002


@pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])
def test_a_load_with_every_setting_changed_does_what_it_does_without(
    connection: Connection, tmp_path: Path, duplicates: float
) -> None:
    as_owner(connection, "CREATE SCHEMA elsewhere")
    changed = {name: given for name, (given, _) in SETTINGS.items()}
    if connection.info.server_version >= 170000:
        changed["transaction_timeout"] = "200ms"
    load_everything(as_role(connection, changed), tmp_path, duplicates)
    assert number(connection, EVENTS) == 9000


@pytest.mark.parametrize("name", SETTINGS)
def test_a_transaction_has_the_settings_that_it_depends_on(one_connection: Connection, name: str) -> None:
    one_connection.execute("CREATE SCHEMA elsewhere")
    one_connection.execute(f"GRANT USAGE ON SCHEMA elsewhere TO {ROLE}".encode())
    given, expected = SETTINGS[name]
    wire = as_role(one_connection, {name: given})
    for _ in range(2):  # with looked-up settings, and with cached ones
        with database.transaction(wire):
            ((value,),) = wire.execute(f"SHOW {name}".encode()).fetchall()
            assert value == expected
            assert wire.execute("SHOW transaction_isolation").fetchone() == ("read committed",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_a_commit_is_durable_and_a_stronger_setting_stays(
    one_connection: Connection, given: str, expected: str
) -> None:
    wire = as_role(one_connection, {"synchronous_commit": given})
    with database.transaction(wire):
        assert wire.execute("SHOW synchronous_commit").fetchone() == (expected,)


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_whose_file_is_removed_survive_a_crash_of_the_server(tmp_path: Path, version: int) -> None:
    """With asynchronous commit and a sleeping WAL writer, committed rows stay in memory for 10 s."""
    with embedded.cluster(version, "-c", "wal_writer_delay=10s") as cluster:
        with psycopg.connect(cluster.dsn) as owner:
            schema.apply_schema(owner, role=ROLE)
            owner.execute("ALTER DATABASE postgres SET synchronous_commit = off")
        spool = tmp_path / "spool"
        spool.mkdir()
        path = segment(spool, 1, *map(event, range(250)))
        Cli(spool, make_conninfo(cluster.dsn, user=ROLE))("run", "--once")
        assert not path.exists()
        cluster.stop(signal.SIGKILL)
        eventually(lambda: not _processes_of(cluster))
        cluster.start()
        with psycopg.connect(cluster.dsn) as owner:
            assert number(owner, EVENTS) == 250


def _processes_of(cluster: embedded.Cluster) -> str:
    """Return the server's child processes, which exit when they notice that it has exited."""
    home = str(psycopg.conninfo.conninfo_to_dict(cluster.dsn)["host"])
    return subprocess.run(["pgrep", "-f", f"{home}/data"], capture_output=True, text=True).stdout


# ---- where names lead -------------------------------------------------------------------------------

HIJACK = """
    CREATE FUNCTION public.hijack(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
    CREATE FUNCTION public.unnest(uuid[]) RETURNS SETOF uuid LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE FUNCTION public.array_agg(integer) RETURNS integer[] LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE FUNCTION public.set_config(text, text, boolean) RETURNS text LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE TABLE public.staging_analytics_events (position varchar)
"""
MORE_HIJACKS = """;
    CREATE FUNCTION public.hijack_array(varchar, text) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE OPERATOR public.= (LEFTARG = varchar, RIGHTARG = text, FUNCTION = public.hijack_array);
    CREATE OPERATOR public.< (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
    CREATE OPERATOR public.> (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
    CREATE OPERATOR public.<> (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = public.hijack);
    CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$;
    CREATE FUNCTION public.count() RETURNS bigint LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'hijacked'; END $$
"""


@pytest.mark.parametrize("path", ["public, pg_catalog", "public", ""])
def test_functions_and_operators_of_other_people_are_not_used(
    connection: Connection, tmp_path: Path, path: str
) -> None:
    as_owner(connection, HIJACK)
    wire = as_role(connection, {"search_path": path or "''"})
    load_everything(wire, tmp_path)


ANSWERS = (
    "ask trend --since 2020-01-01 --bucket month", "ask active", "ask lifecycle", "ask retention", "ask funnel x y",
    "ask sessions", "ask sessions --gap 30m", "ask requests", "ask anomalies", "ask interactions", "report",
    "rollup", "rollup --verify",
)  # fmt: skip


@pytest.mark.parametrize("command", ["status", "doctor", "prune --older-than 90d", "rejects retry", *ANSWERS])
def test_no_command_uses_the_settings_or_the_functions_of_other_people(
    cli: Cli, one_connection: Connection, command: str
) -> None:
    segment(cli.spool, 1, event(1), event(2), b"{broken")
    cli("run", "--once", code=3)
    one_connection.execute((HIJACK + MORE_HIJACKS).encode())
    one_connection.commit()
    changed = {name: given for name, (given, _) in SETTINGS.items()} | {"search_path": "public, pg_catalog"}
    changed["idle_in_transaction_session_timeout"] = "500ms"  # which a slow machine needs for a BEGIN
    changed["IntervalStyle"] = "sql_standard"
    if command in ANSWERS:
        del changed[
            "statement_timeout"
        ]  # a reader's limit, which protects the server from expensive questions
    as_role(one_connection, changed).close()
    one_connection.execute("RESET ROLE")
    one_connection.execute("GRANT DELETE ON ALL TABLES IN SCHEMA public TO analytics_loader")
    one_connection.commit()
    printed = cli(*command.split(), "--json", code=None)
    assert "hijacked" not in printed and "Traceback" not in printed
    if command == "status":
        status = json.loads(printed)["database"]
        assert status["events"] == 2 and status["last_loaded_at"].endswith("+00:00")
    elif command == "prune --older-than 90d":
        assert json.loads(printed)["events"] == 2
    elif command in ANSWERS:
        assert json.loads(printed.splitlines()[0])  # a remark may follow
    elif command == "doctor":
        verdicts = {finding["check"]: finding["verdict"] for finding in json.loads(printed.splitlines()[0])}
        assert {verdicts[name] for name in ("connection", "clock", "schema", "tables")} == {"ok"}


def test_init_with_every_setting_changed_does_what_it_does_without(
    cli: Cli, one_connection: Connection
) -> None:
    changed = {name: given for name, (given, _) in SETTINGS.items() if name != "search_path"}
    changed["idle_in_transaction_session_timeout"] = "500ms"  # which a slow machine needs for a BEGIN
    name = sql.Identifier(one_connection.info.dbname)
    for setting, value in changed.items():
        change = sql.SQL("ALTER DATABASE {} SET {} = {}")
        one_connection.execute(change.format(name, sql.SQL(setting), sql.Literal(value)))
    one_connection.commit()
    cli.owner()("init", "--role", ROLE)
    one_connection.execute("DROP TABLE analytics_events, analytics_metrics, analytics_loads CASCADE")
    one_connection.commit()
    cli.owner()("init", "--role", ROLE)
    segment(cli.spool, 1, event(1), metric(1))
    cli("run", "--once")
    findings = json.loads(cli("doctor", "--json").splitlines()[0])
    assert {each["finding"] for each in findings if each["check"] == "tables"} == {
        "compatible with the loader"
    }


def test_the_tables_are_found_in_their_schema_whatever_the_search_path_is(
    connection: Connection, tmp_path: Path
) -> None:
    names = ("analytics_events", "analytics_metrics", "analytics_loads")
    as_owner(connection, "CREATE SCHEMA apart; GRANT USAGE ON SCHEMA apart TO analytics_loader")
    for name in names:
        as_owner(connection, f"ALTER TABLE {name} SET SCHEMA apart")
    wire = as_role(connection, {"search_path": "public"})
    assert load(wire, [chunk(event(1), metric(1), event(1))], tmp_path).counts == Counts(1, 1, 1)
    assert rows(connection, "SELECT count(*) FROM apart.analytics_events") == [(1,)]


def test_a_temporary_table_shadows_nothing(connection: Connection, tmp_path: Path) -> None:
    for name in ("analytics_events", "analytics_loads"):
        connection.execute(f"CREATE TEMP TABLE {name} (LIKE public.{name} INCLUDING ALL)".encode())
    connection.commit()
    load(connection, [chunk(event(1))], tmp_path)
    assert rows(connection, "SELECT count(*) FROM public.analytics_events") == [(1,)]


def test_nothing_of_the_settings_is_left_behind_in_a_session_that_a_pooler_shares(
    connection: Connection, tmp_path: Path
) -> None:
    def settings() -> list[tuple[str, str]]:
        of_session = "SELECT name, setting FROM pg_settings WHERE source = 'session' ORDER BY name"
        found = rows(connection, of_session)
        return [each for each in found if each[0] != "transaction_isolation"]  # each BEGIN resets it

    before = settings()
    load(connection, [chunk(event(1), event(1))], tmp_path)
    assert settings() == before


def test_staged_values_have_the_types_that_the_columns_have_now(
    connection: Connection, tmp_path: Path
) -> None:
    as_owner(connection, f"DROP VIEW analytics_metrics_hourly; {DROP_QUESTIONS}")
    as_owner(connection, "ALTER TABLE analytics_metrics ALTER value TYPE numeric(10, 1)")
    load(connection, [chunk(metric(1), metric(1))], tmp_path)
    as_owner(connection, "ALTER TABLE analytics_metrics ALTER value TYPE numeric")
    load(connection, [chunk(metric(2, value=1.25), metric(2, value=1.25))], tmp_path, 1.0)
    assert rows(connection, "SELECT value FROM analytics_metrics WHERE value > 1") == [(1.25,)]


# ---- connections that somebody ends -------------------------------------------------------------------


def test_a_timeout_is_waited_out_and_is_not_called_an_outage() -> None:
    for error in (
        psycopg.errors.IdleInTransactionSessionTimeout("terminating connection"),
        psycopg.errors.lookup("25P04")("terminating connection due to transaction timeout"),
        psycopg.errors.QueryCanceled("canceling statement due to statement timeout"),
        psycopg.errors.lookup("57P05")("terminating connection due to idle-session timeout"),
    ):
        assert action(error.sqlstate) is Action.RETRY
        assert "out of reach" not in str(explain(error))


def test_a_connection_that_was_closed_while_idle_is_opened_again_without_a_word(
    cli: Cli, one_connection: Connection
) -> None:
    as_role(one_connection, {"idle_session_timeout": "100ms"}).close()
    with cli.daemon() as process:
        for n in range(3):
            segment(cli.spool, n + 1, event(n))
            eventually(partial(is_number, one_connection, EVENTS, n + 1))
            eventually(lambda: not number(one_connection, LOADERS))
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert "WARNING" not in log and "out of reach" not in log


LOADERS = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND usename = '{ROLE}'"


def test_a_lost_connection_is_one_whatever_psycopg_raises(one_connection: Connection) -> None:
    """Also a ValueError, after the server crashed at the end of a COPY and the connection has no socket."""
    wire = database.connect(one_connection.info.dsn)
    with pytest.raises(psycopg.OperationalError, match="the connection was lost"), database.transaction(wire):
        wire.close()
        raise ValueError("Invalid file descriptor: -1")
    with pytest.raises(ValueError), database.transaction(one_connection):
        raise ValueError("a bug")
