"""Messages name the source of the problem, show no password, and can be printed on any terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from psycopg.conninfo import conninfo_to_dict

from loader import settings
from loader.errors import UsageError
from loader.load.database import Connection
from tests.load.lines import event, number, segment
from tests.processes import LOADER, Cli

URL = "postgresql://user:secret@host:5432/db"


def parsed(url: str) -> dict[str, str]:
    dsn = settings.database_dsn(None, {"DATABASE_URL": url})
    return {name: str(value) for name, value in conninfo_to_dict(dsn).items()}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("pgbouncer=true&connection_limit=1&pool_timeout=0", {}),
        ("statement_cache_size=0&prepared_statement_cache_size=0", {}),
        ("ssl=require", {"sslmode": "require"}),
        ("ssl=true", {"sslmode": "require"}),
        ("ssl=false", {"sslmode": "disable"}),
        ("ssl=verify-full", {"sslmode": "verify-full"}),
        ("sslmode=no-verify", {"sslmode": "require"}),
        ("schema=public", {"options": "-c search_path=public"}),
        ("schema=my%20schema", {"options": "-c search_path=my\\ schema"}),
        ("options=-c%20jit%3Doff&schema=app", {"options": "-c jit=off -c search_path=app"}),
        ("sslmode=verify-full&connect_timeout=9", {"sslmode": "verify-full", "connect_timeout": "9"}),
    ],
)
def test_parameters_of_other_drivers_mean_what_they_mean_there(query: str, expected: dict[str, str]) -> None:
    plain = parsed(URL)
    assert parsed(f"{URL}?{query}") == plain | expected
    for scheme in ("postgresql+asyncpg", "postgres"):
        assert parsed(f"{URL}?{query}".replace("postgresql", scheme)) == plain | expected


@pytest.mark.parametrize("variable", ["DATABASE_URL", "LOADER_DSN"])
def test_a_parameter_that_nobody_knows_is_named_with_its_variable_but_not_its_value(variable: str) -> None:
    with pytest.raises(UsageError) as raised:
        settings.database_dsn(None, {variable: f"{URL}?colour=purple"})
    assert '"colour"' in str(raised.value) and variable in str(raised.value)
    assert "purple" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "userinfo",
    [
        "u:se@cret",
        "u:se@/cret",
        "u:s/e@cret",
        "u:@secret",
        "u:s%40e@cret",
        "u:se#@cret",
        "u:s?e@cret",
        "u@x:cret",
    ],
)
@pytest.mark.parametrize("query", ["", "?sslmode=disable", "?pgbouncer=true"])
def test_a_password_with_special_characters_shows_nothing_of_itself(userinfo: str, query: str) -> None:
    url = f"postgresql://{userinfo}@127.0.0.1:1/db{query}"
    environment = {**os.environ, "LOADER_DSN": url, "SPOOL_DIR": "/tmp"}
    ended = subprocess.run([*LOADER, "init"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "%40 for @" in ended.stderr
    assert "cret" not in ended.stderr and ended.stderr.count("\n") == 1


def test_a_password_that_is_written_as_in_a_url_is_accepted() -> None:
    assert parsed("postgresql://u:s%40e%2Fc%3F@host/db?options=-c%20x.y%3Da@b")["password"] == "s@e/c?"


def test_the_schema_of_a_url_holds_the_tables(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute("CREATE SCHEMA app")
    one_connection.commit()
    host, name = one_connection.info.host, one_connection.info.dbname
    cli.environment["LOADER_DSN"] = f"postgresql://postgres@/{name}?host={host}&schema=app&pgbouncer=true"
    cli("init")
    assert number(one_connection, "SELECT count(*) FROM pg_tables WHERE schemaname = 'app'") == 13
    segment(cli.spool, 1, event(1))
    cli("run", "--once")
    assert number(one_connection, "SELECT count(*) FROM app.analytics_events") == 1


@pytest.mark.parametrize(
    ("variable", "value", "command"),
    [
        ("LOADER_WORKERS", "many", "run"),
        ("LOADER_WORKERS", "0", "backfill x"),
        ("LOADER_METRICS_PORT", "x", "run"),
    ],
)
def test_a_wrong_value_of_the_environment_is_reported_with_its_variable(
    cli: Cli, variable: str, value: str, command: str
) -> None:
    printed = cli(*command.split(), variables={variable: value}, code=2)
    assert variable in printed and "--workers" not in printed.replace("--help", "")


def test_a_wrong_value_of_an_option_is_reported_with_the_option(cli: Cli) -> None:
    printed = cli("run", "--workers", "many", variables={"LOADER_WORKERS": "2"}, code=2)
    assert "--workers" in printed and "LOADER_WORKERS" not in printed


@pytest.mark.parametrize(
    "arguments", ["rejects show", "rejects list", "status", "doctor", "rejects show --json"]
)
def test_every_command_prints_on_an_ascii_terminal(cli: Cli, arguments: str) -> None:
    segment(cli.spool, 1, '{"größe": "日本"'.encode())
    cli("run", "--once", code=3)
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    printed = cli(*arguments.split(), variables=ascii_only)
    assert printed.isascii()
    if arguments == "rejects show":
        assert r"gr\xf6\xdfe" in printed


def test_init_reports_what_it_created_and_granted(cli: Cli, one_connection: Connection) -> None:
    name = f"role_of_{one_connection.info.dbname[:20]}"
    printed = cli.owner()("init", "--role", name)
    assert f'created the role "{name}", without a password' in printed
    assert "SELECT on" in printed and "INSERT on" in printed and "USAGE on the schema public" in printed
    assert "created the role" not in cli.owner()("init", "--role", name)
    one_connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())
    one_connection.commit()


@pytest.mark.parametrize(
    "bug", ["ValueError('sesame')", "TypeError('x')", "psycopg.ProgrammingError('x')", "KeyError(1)"]
)
def test_a_bug_is_printed_as_a_bug(cli: Cli, bug: str) -> None:
    code = (
        "import psycopg, sys\nfrom loader.operate import status\n"
        f"def broken(*_): raise {bug}\n"
        "status.spool = broken\nfrom loader.cli.main import cli\ncli(['status'], prog_name='loader')"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=cli.environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback (most recent call last)" in ended.stderr
    assert "this is a bug in the loader 0.1.0" in ended.stderr.splitlines()[-1]
