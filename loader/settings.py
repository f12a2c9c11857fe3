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

DEFAULT_SPOOL: Final = Path("/var/spool/analytics")
"""Where the emitter writes, too, when SPOOL_DIR is not set."""
_PG_VARIABLES: Final = ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPORT")
_DRIVER: Final = re.compile(r"^(postgres(?:ql)?)\+\w+://")

_CONNECTION: Final = {
    "application_name": "analytics-loader",
    "client_encoding": "UTF8",
    "connect_timeout": "10",
    "tcp_user_timeout": "30000",
}
"""Defaults of a connection: who it is, the encoding of the rows, and seconds and milliseconds after which a
host that does not answer is given up (https://www.postgresql.org/docs/current/libpq-connect.html)."""


def spool_directory(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the spool: what was given, else SPOOL_DIR, else the default.

    Raises UsageError, also for one that everyone may write to and somebody else may give away: whoever plants
    files there decides what this process reads, and may exchange the spool itself.
    """
    directory = (given or Path(environment.get("SPOOL_DIR") or DEFAULT_SPOOL)).absolute()
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
    """Return where the database is: what was given, else LOADER_DSN, else DATABASE_URL, else libpq's PG*.

    A URL may name a driver, as SQLAlchemy's do (`postgresql+asyncpg://`). Raises UsageError.
    """
    dsn = given or environment.get("LOADER_DSN") or environment.get("DATABASE_URL")
    if not dsn and not any(environment.get(name) for name in _PG_VARIABLES):
        raise UsageError(
            "no database is set: set LOADER_DSN (or DATABASE_URL, or libpq's PGHOST and PGDATABASE), "
            "or give --dsn, for example postgresql://user@host/database"
        )
    try:
        given_values = conninfo_to_dict(_DRIVER.sub(r"\1://", dsn or ""))
    except psycopg.ProgrammingError as error:
        raise UsageError(f"the DSN can't be read: {str(error).strip()}") from None
    return make_conninfo("", **{**_CONNECTION, **{name: str(value) for name, value in given_values.items()}})
