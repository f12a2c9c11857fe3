"""Which spool and which database: a flag beats the environment, and nothing is guessed."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from loader.errors import UsageError
from spool.segment import DEFAULT_DIRECTORY

_PG_VARIABLES: Final = ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPORT")
_LONGEST_DSN: Final = 16 << 10
_DRIVER: Final = re.compile(r"^(postgres(?:ql)?)\+\w+://")

_CONNECTION: Final = {
    "application_name": "analytics-loader",
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    "tcp_user_timeout": "30000",
}
"""Defaults of a connection: who it is, the encoding of the rows, and seconds and milliseconds after which a
host that does not answer is given up (https://www.postgresql.org/docs/current/libpq-connect.html)."""


_NO_DSN: Final = (
    "the DSN can't be read (it may hold a password and is not shown): write postgresql://user@host/database "
    "or host=... dbname=..., with special characters of a password as in a URL (%40 for @)"
)


def spool_directory(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the spool: what was given, else SPOOL_DIR, else the default.

    Raises UsageError, also for one that everyone may write to and somebody else may give away: whoever plants
    files there decides what this process reads, and may exchange the spool itself.
    """
    directory = (given or Path(environment.get("SPOOL_DIR") or DEFAULT_DIRECTORY)).absolute()
    try:
        status = directory.stat()
    except OSError as error:
        problem = "does not exist: create it" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        raise UsageError(f"spool directory {directory} {problem}, or set SPOOL_DIR or --spool-dir") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"spool directory {directory} is not a directory: set SPOOL_DIR or --spool-dir")
    if status.st_mode & stat.S_IWOTH and status.st_uid != os.geteuid():
        raise UsageError(
            f"spool directory {directory} is another user's ({owner(status.st_uid)}) and everyone may write "
            f"to it: chmod o-w {directory}, or set SPOOL_DIR or --spool-dir to a directory of your own"
        )
    return directory


def owner(uid: int) -> str:
    """Return the name of a user, or the number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def database_dsn(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return where the database is: what was given, else LOADER_DSN, else what the file LOADER_DSN_FILE has,
    else DATABASE_URL, else libpq's PG*.

    A URL may name a driver, as SQLAlchemy's do (`postgresql+asyncpg://`). Raises UsageError, which shows
    nothing of the DSN: a part that stands in the wrong place may be the password.
    """
    named = (environment.get(name, "") for name in ("LOADER_DSN", "LOADER_DSN_FILE", "DATABASE_URL"))
    direct, file, other = named
    dsn = given or direct or (_written_in(Path(file)) if file else "") or other
    if not dsn and not any(environment.get(name) for name in _PG_VARIABLES):
        raise UsageError(
            "no database is set: set LOADER_DSN (or DATABASE_URL, or libpq's PGHOST and PGDATABASE), "
            "or give --dsn, for example postgresql://user@host/database"
        )
    try:
        given_values = conninfo_to_dict(_DRIVER.sub(r"\1://", dsn))
    except psycopg.ProgrammingError:
        raise UsageError(_NO_DSN) from None
    values = {name: str(value) for name, value in given_values.items()}
    if not re.fullmatch(r"(\d+(,|$))*", values.get("port", "")):
        raise UsageError(_NO_DSN)
    return make_conninfo("", **{**_CONNECTION, **values})


def has_password(dsn: str) -> bool:
    """Whether a DSN, as it was given, holds a password."""
    return bool(conninfo_to_dict(database_dsn(dsn)).get("password"))


def _written_in(file: Path) -> str:
    try:
        with file.open() as stream:
            return stream.read(_LONGEST_DSN).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the DSN can't be read from LOADER_DSN_FILE: {error}") from None
