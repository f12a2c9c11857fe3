"""Selects the spool and the database: a flag overrides the environment, and nothing is guessed."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode

from loader.errors import UsageError
from spool.segment import DEFAULT_DIRECTORY

PG_VARIABLES: Final = ("PGHOST", "PGHOSTADDR", "PGDATABASE", "PGSERVICE", "PGUSER", "PGPORT")
_LONGEST_DSN: Final = 16 << 10
_DRIVER: Final = re.compile(r"^(postgres(?:ql)?)\+\w+://")

_CONNECTION: Final = {
    "application_name": "analytics-loader",
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    "tcp_user_timeout": "30000",
}
"""Defaults of a connection: the application name, the encoding of the rows, and timeouts, in seconds and
milliseconds, for a host that does not answer (https://www.postgresql.org/docs/current/libpq-connect.html)."""


_SSL_MODES: Final = {
    "": "require", "1": "require", "t": "require", "true": "require", "on": "require", "yes": "require",
    "no-verify": "require", "0": "disable", "f": "disable", "false": "disable", "off": "disable",
    "no": "disable",
}  # fmt: skip
"""Values of `ssl` (asyncpg, node-postgres, JDBC) and foreign values of `sslmode`, mapped to libpq's sslmode."""
_SCHEMA_PARAMETERS: Final = ("schema", "currentSchema", "search_path")
"""Parameters with which Prisma, JDBC and others select the schema."""
_POOL_PARAMETERS: Final = frozenset(
    {"pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "pool", "pool_size", "max_overflow",
     "pool_recycle", "pool_pre_ping", "conn_max_age", "conn_health_checks", "statement_cache_size",
     "prepared_statement_cache_size", "prepared_statements", "prepareThreshold", "command_timeout", "timeout",
     "reaping_frequency", "checkout_timeout", "idle_timeout", "max_client_conn", "encoding", "async_fallback",
     "single_sentence", "supa", "workaround"}
)  # fmt: skip
"""Parameters of drivers and their pools (Prisma, SQLAlchemy, asyncpg, Django, Rails, Supabase) that do not
affect a connection."""

_NO_DSN: Final = (
    "the DSN is invalid (not shown, because it may contain a password): write "
    "postgresql://user@host/database "
    "or host=... dbname=..., with special characters of a password escaped as in a URL (%40 for @)"
)


def spool_directory(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """Return the spool: the given one, SPOOL_DIR, or the default.

    Raises UsageError, also for a world-writable directory owned by another user: anybody could plant files
    there for this process to read, or replace the spool itself.
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
            f"spool directory {directory} is world-writable and owned by another user "
            f"({owner(status.st_uid)}): chmod o-w {directory}, or set SPOOL_DIR or --spool-dir to a "
            f"directory of your own; in a volume such as emptyDir (securityContext: fsGroup), let an init "
            f"container create one: mkdir -p -m 2770 {directory}/analytics"
        )
    return directory


def owner(uid: int) -> str:
    """Return the name of a user, or the number if it has no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def database_dsn(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """Return the DSN: given, or from LOADER_DSN, LOADER_DSN_FILE, DATABASE_URL or libpq's PG*, in this order.

    A URL may name a driver, as in SQLAlchemy (`postgresql+asyncpg://`). Raises UsageError, which never shows
    the DSN: a misplaced part of it may be the password.
    """
    named = (environment.get(name, "") for name in ("LOADER_DSN", "LOADER_DSN_FILE", "DATABASE_URL"))
    direct, file, other = named
    dsn = given or direct or (_written_in(Path(file)) if file else "") or other
    if not dsn and not any(environment.get(name) for name in PG_VARIABLES):
        raise UsageError(
            "no database is set: set LOADER_DSN (or DATABASE_URL, or libpq's PGHOST and PGDATABASE), "
            "or give --dsn, for example postgresql://user@host/database"
        )
    source = "the DSN" if given else "LOADER_DSN" if direct else "LOADER_DSN_FILE" if file else "DATABASE_URL"
    return _conninfo(dsn, source)


def has_database(given: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether any source of `database_dsn` is set."""
    names = ("LOADER_DSN", "LOADER_DSN_FILE", "DATABASE_URL", *PG_VARIABLES)
    return bool(given) or any(environment.get(name) for name in names)


def _conninfo(dsn: str, source: str) -> str:
    """Return a DSN from `source` in libpq's form. Raises UsageError as `database_dsn` does."""
    import psycopg  # slow to import, and not needed by commands without a database
    from psycopg.conninfo import conninfo_to_dict, make_conninfo

    try:
        given = conninfo_to_dict(_libpq_url(_DRIVER.sub(r"\1://", dsn), source))
    except psycopg.ProgrammingError:
        raise UsageError(_NO_DSN) from None
    values = {name: str(value) for name, value in given.items()}
    hosts = values.get("host", "").split(",")
    if not re.fullmatch(r"(\d+(,|$))*", values.get("port", "")) or any("@" in host[1:] for host in hosts):
        raise UsageError(_NO_DSN)
    return make_conninfo("", **{**_CONNECTION, **values})


def _libpq_url(dsn: str, source: str) -> str:
    """Return a URL with driver parameters translated to libpq's, or removed; return other DSNs unchanged.

    Raises UsageError for an unknown parameter, and for a URL with more than one @: the text after the first
    would be taken for a host and shown in messages.
    """
    if not re.match(r"postgres(ql)?://", dsn):
        return dsn
    place, at, rest = dsn.partition("@") if "@" in dsn.partition("?")[0] else ("", "", dsn)
    location, question, query = rest.partition("?")
    if "@" in location or "/" in place.partition("://")[2]:
        raise UsageError(_NO_DSN)
    if not at and "@" in query and not re.fullmatch(r"[^:]*(:\d*)?(/.*)?", location.partition("://")[2]):
        raise UsageError(_NO_DSN)  # a password with a question mark
    if not question:
        return dsn
    kept: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        kept.update(_libpq_parameter(name, value, source, kept.get("options", "")))
    return f"{place}{at}{location}?{urlencode(kept, quote_via=quote)}"


def _libpq_parameter(name: str, value: str, source: str, options: str) -> dict[str, str]:
    """Return the libpq parameters equivalent to a URL parameter, if any."""
    if name in _POOL_PARAMETERS:
        return {}
    if name in ("ssl", "sslmode"):
        return {"sslmode": _SSL_MODES.get(value.lower(), value)}
    if name in _SCHEMA_PARAMETERS:
        setting = value.replace("\\", "\\\\").replace(" ", "\\ ")
        return {"options": f"{options} -c search_path={setting}".strip()}
    if name == "options":
        return {"options": f"{options} {value}".strip()}
    if not re.fullmatch(r"\w+", name):
        raise UsageError(_NO_DSN)
    if name not in _libpq_names():
        raise UsageError(
            f'{source} has the parameter "{name}", which libpq does not know: remove it, or set '
            "LOADER_DSN to a URL without it"
        )
    return {name: value}


def _libpq_names() -> set[str]:
    from psycopg import pq

    return {option.keyword.decode() for option in pq.Conninfo.get_defaults()}


def has_password(dsn: str) -> bool:
    """Whether a DSN contains a password."""
    from psycopg.conninfo import conninfo_to_dict

    return bool(conninfo_to_dict(database_dsn(dsn)).get("password"))


def _written_in(file: Path) -> str:
    try:
        with file.open() as stream:
            return stream.read(_LONGEST_DSN).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"could not read the DSN from LOADER_DSN_FILE: {error}") from None
