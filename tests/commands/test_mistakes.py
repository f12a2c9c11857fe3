"""Every user error is one line that names the problem, its place and the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

from loader.extras import install_command
from loader.load.database import Connection
from tests.load.lines import STEM, event, joined, segment
from tests.processes import Cli

Setting = dict[str, str]
Prepare = Callable[[Cli, Connection], object]


def nothing(_: Cli, __: Connection) -> None:
    """Prepare nothing: only the command is wrong."""


def setting(name: str, value: str | None) -> Prepare:
    def prepare(cli: Cli, _: Connection) -> None:
        cli.environment.pop(name, None)
        if value is not None:
            cli.environment[name] = value

    return prepare


def sql(statement: str) -> Prepare:
    def prepare(_: Cli, connection: Connection) -> None:
        connection.execute(statement.encode())
        connection.commit()

    return prepare


def in_spool(name: str, data: bytes | None = None) -> Prepare:
    """Create a file or directory in the spool."""

    def prepare(cli: Cli, _: Connection) -> None:
        path = cli.spool / name
        path.parent.mkdir(exist_ok=True)
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)

    return prepare


def given(name: str, data: bytes) -> Prepare:
    return lambda cli, _: (cli.spool.parent / name).write_bytes(data)


def one_sealed(cli: Cli, _: Connection) -> None:
    segment(cli.spool, 1, event(1))


def read_only(_: Cli, connection: Connection) -> None:
    name = connection.info.dbname
    sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")(_, connection)
    one_sealed(_, connection)


def no_tables(cli: Cli, connection: Connection) -> None:
    tables = "analytics_events, analytics_metrics, analytics_loads, analytics_schema"
    sql(f"DROP TABLE {tables} CASCADE")(cli, connection)
    one_sealed(cli, connection)


def no_privilege(cli: Cli, connection: Connection) -> None:
    sql("REVOKE INSERT ON analytics_events FROM analytics_loader")(cli, connection)
    one_sealed(cli, connection)


def no_dsn_file(cli: Cli, _: Connection) -> None:
    del cli.environment["LOADER_DSN"]
    cli.environment["LOADER_DSN_FILE"] = "/nowhere"


MISTAKES: dict[str, tuple[Prepare, str, int, str]] = {
    "an unknown option": (nothing, "run --bogus", 2, "See `loader run --help`"),
    "an unknown command": (nothing, "fly", 2, "See `loader --help`"),
    "no database": (setting("LOADER_DSN", None), "run", 2, "set LOADER_DSN"),
    "a DSN that is none": (nothing, "run --dsn nonsense", 2, "write postgresql://user@host/database"),
    "a port that is none": (nothing, "status --dsn postgresql://u:a/b@h/x", 2, "write postgresql://"),
    "a DSN file that is not there": (
        no_dsn_file,
        "run",
        2,
        "LOADER_DSN_FILE",
    ),
    "a server that is not there": (nothing, "run --once --dsn host=/nowhere", 4, "out of reach"),
    "a host that refuses": (nothing, "init --dsn postgresql+asyncpg://127.0.0.1:1/x", 4, "out of reach"),
    "a database that is not there": (
        nothing,
        "init --dsn {dsn} dbname=nowhere",
        4,
        '"nowhere" does not exist',
    ),
    "a user who is not there": (
        nothing,
        "init --dsn {dsn} user=nobody_here",
        4,
        '"nobody_here" does not exist',
    ),
    "a spool that is not there": (
        nothing,
        "status --spool-dir /nowhere",
        2,
        "/nowhere does not exist: create it",
    ),
    "a spool that is a file": (
        nothing,
        "status --spool-dir /etc/passwd",
        2,
        "is not a directory: set SPOOL_DIR",
    ),
    "too few workers": (nothing, "run --workers 0", 2, "--workers"),
    "workers that are not a number": (setting("LOADER_WORKERS", "many"), "run", 2, "LOADER_WORKERS"),
    "JSON of a daemon": (nothing, "run --json", 2, "--json requires --once"),
    "nothing to backfill": (nothing, "backfill", 2, "PATH"),
    "a file that is not there": (
        nothing,
        "backfill /nowhere/x.ndjson",
        2,
        "/nowhere/x.ndjson does not exist",
    ),
    "a directory without a file to load": (
        in_spool("empty"),
        "backfill {home}/spool/empty",
        2,
        "spool/empty contains no file",
    ),
    "an open segment": (
        given(f"{STEM.format(1)}.open", b""),
        f"backfill {{home}}/{STEM.format(1)}.open",
        2,
        "`loader run --once` seals",
    ),
    "no reject file of that name": (nothing, "rejects show x", 2, "see `loader rejects list`"),
    "a file that is not a reject file": (
        in_spool("rejected/x.ndjson", b"{}\n"),
        "rejects list",
        1,
        "x.ndjson, line 1",
    ),
    "an age that is none": (nothing, "prune --older-than soon", 2, "as 90d"),
    "no age": (nothing, "prune", 2, "--older-than"),
    "an archive that is a file": (nothing, "run --once --archive /etc/passwd", 2, "--archive"),
    "no tables": (no_tables, "run --once", 1, "run `loader init` first"),
    "no privilege": (no_privilege, "run --once", 1, "run `loader init --role`"),
    "a read-only server": (read_only, "run --once", 1, "connect to the primary"),
    "a newer schema": (
        sql("INSERT INTO analytics_schema (version) VALUES (9)"),
        "init --dsn {dsn}",
        1,
        "upgrade",
    ),
    "the owner as the loader's role": (nothing, "init --dsn {dsn} --role postgres", 1, "a role of its own"),
    "no right to make tables": (no_tables, "init", 1, "as the owner of the database"),
    "no right to delete": (nothing, "prune --older-than 1d", 1, "DELETE"),
    "a planted lock": (in_spool(".loader.lock"), "run --once", 1, "remove it"),
    "a file in the place of the rejects": (in_spool("rejected", b""), "rejects list", 1, "move it away"),
}


@pytest.mark.parametrize(("prepare", "command", "code", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_user_error_is_one_line_with_a_remedy(
    cli: Cli, one_connection: Connection, prepare: Prepare, command: str, code: int, says: str
) -> None:
    prepare(cli, one_connection)
    words = {"{dsn}": one_connection.info.dsn}
    arguments = command.replace("{home}", str(cli.spool.parent)).split()
    if "{dsn}" in arguments:  # with the following words, up to an option
        place = arguments.index("{dsn}")
        more = [word for word in arguments[place + 1 :] if "=" in word]
        arguments[place : place + 1 + len(more)] = [" ".join([words["{dsn}"], *more])]
    ended = cli.run(*arguments)
    errors = ended.stderr.decode()
    assert ended.returncode == code, errors
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and says in lines[0], errors


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_taken_is_named(cli: Cli) -> None:
    with taken_port() as port:
        printed = cli("run", "--metrics-port", str(port), code=2)
    assert f"metrics port {port}" in printed and "choose another" in printed and printed.count("\n") == 1


def test_a_password_on_the_command_line_is_warned_of(cli: Cli) -> None:
    printed = cli("run", "--once", "--dsn", f"{cli.dsn} password=sesame")
    assert "exposes its password" in printed and "sesame" not in printed


def test_what_the_demo_needs_is_named() -> None:
    code = "from loader import extras; from loader.cli import main; extras.find_spec = lambda name: None; main.cli(['demo'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and f"fastapi is not installed: {install_command('demo')}" in ended.stderr


def test_a_lost_database_is_reported_with_its_exit_code(cli: Cli, one_connection: Connection) -> None:
    name, dsn = one_connection.info.dbname, one_connection.info.dsn
    one_connection.close()
    with psycopg.connect(dsn, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
    (cli.spool.parent / "a.ndjson").write_bytes(joined(event(1)))
    assert "not currently accepting connections" in cli("backfill", cli.spool.parent / "a.ndjson", code=4)
