"""The tables: creates or upgrades them (schema.sql, role.sql, reader.sql) and reads their version.

No lock is waited for longer than a second at a time, because whoever needs the locked table queues behind the
wait: auth.users is the application's. In between, the application has its turn.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Final, Literal, NamedTuple

import psycopg
from psycopg.errors import Diagnostic

from loader.errors import OutOfReachError
from loader.load import deviations
from loader.load.database import SINCE_17, VERSION_17, Connection

SCHEMA_VERSION: Final = 5
"""The version that schema.sql creates. This loader can load into the tables of every earlier version."""
PATIENCE: Final = 60.0
"""Seconds after which a lock is given up that other sessions do not release."""
_PAUSE_SECONDS: Final = 1.0
"""Between two attempts to get a lock, on average: as long as an attempt, so others have half the time."""
_STATEMENT: Final = re.compile(r"^DO \$(\w+)\$.*?^\$\1\$;$", re.MULTILINE | re.DOTALL)
_NO_LOCK: Final = ("55P03", "40P01")
"""lock_not_available, deadlock_detected."""
_FOUND: Final = (
    "SELECT relname, relkind::text FROM pg_catalog.pg_class WHERE oid OPERATOR(pg_catalog.=) ANY (ARRAY["
    "pg_catalog.to_regclass('analytics_schema')::oid, pg_catalog.to_regclass('analytics_loads')::oid])"
)
_REPORTED: Final = (
    "SELECT pg_catalog.current_setting('analytics.version_before'), "
    "pg_catalog.current_setting('analytics.foreign_keys'), pg_catalog.current_setting('analytics.identity'), "
    "pg_catalog.current_setting('analytics.layout')"
)
"""What the first statement of schema.sql leaves for its transaction."""
_SUCCESS: Final = "00000"
"""Of a RAISE NOTICE without a code."""

ForeignKeys = Literal["on", "off"]
Identity = Literal["required", "optional"]
Layout = Literal["plain", "partitioned", "citus"]
Width = Literal["day", "week", "month"]


class _Notice(NamedTuple):
    severity: str | None
    sqlstate: str | None
    message: str


@dataclass
class Applied:
    """What applying the schema did: versions (0 is none), the choices, and what a person should know."""

    before: int = 0
    version: int = SCHEMA_VERSION
    foreign_keys: ForeignKeys = "on"
    identity: Identity = "required"
    layout: Layout = "plain"
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, notices: Sequence[_Notice]) -> None:
        """Keep what the scripts report themselves, not that a table exists."""
        for notice in notices:
            is_warning = notice.severity == "WARNING"
            kept = self.warnings if is_warning else self.notes
            if (is_warning or notice.sqlstate == _SUCCESS) and notice.message not in kept:
                kept.append(notice.message)


def apply_schema(
    connection: Connection, *, foreign_keys: bool | None = None, identity: Identity | None = None,
    layout: Layout | None = None, width: Width | None = None, role: str | None = None,
    reader: str | None = None, patience: float = PATIENCE,
) -> Applied:  # fmt: skip
    """Apply schema.sql, role.sql for a role, and reader.sql for a reader. Idempotent.

    `foreign_keys`, `identity`, `layout` and `width` (of partitions) are choices to remember; None keeps what
    was chosen before. New tables get the keys, require an identity, and are plain. Tables that exist keep
    their layout. Partitions are created afterwards, by partitions.py.
    The connection must not be in a transaction: the tables and the questions have one, each step of the keys
    another. Tables with rows get no new indexes here: see indexes.py. Raises psycopg.Error, and LoaderError
    for tables that cannot be loaded; then nothing was changed.
    """
    statements = {match[1]: match[0].encode() for match in _STATEMENT.finditer(_script("schema.sql"))}
    applied = Applied()

    def apply_tables() -> None:
        deviations.refuse(deviations.find(connection))
        choice = "" if foreign_keys is None else "on" if foreign_keys else "off"
        _set(connection, "analytics.foreign_keys", choice)
        for setting, chosen in (("identity", identity), ("layout", layout), ("width", width)):
            _set(connection, f"analytics.{setting}", chosen or "")
        _set(connection, "analytics.indexes", "later")
        connection.execute(statements["tables"])
        connection.execute(statements["questions"])
        for kind, name in (("role", role), ("reader", reader)):
            if name is not None:
                _set(connection, f"analytics.{kind}", name)
                connection.execute(_script(f"{kind}.sql").encode())
        ((version, *choices),) = connection.execute(_REPORTED).fetchall()
        applied.before = int(version)
        applied.foreign_keys, applied.identity, applied.layout = choices
        applied.warnings += [str(each) for each in deviations.find(connection)]

    _until_locked(connection, apply_tables, applied, patience)
    for step in ("foreign_keys", "validation"):
        _until_locked(connection, partial(connection.execute, statements[step]), applied, patience)
    return applied


def schema_version(connection: Connection) -> int:
    """Return the version of the tables, 0 if there are none. Raises psycopg.Error."""
    kinds: dict[str, str] = dict(connection.execute(_FOUND).fetchall())
    if kinds.get("analytics_schema") != "r":  # functions of a view would run with the rights of the caller
        return 1 if "analytics_loads" in kinds else 0
    statement = "SELECT coalesce(pg_catalog.max(version), 1) FROM analytics_schema"
    ((version,),) = connection.execute(statement).fetchall()
    return int(version)


def _until_locked(
    connection: Connection, apply: Callable[[], object], applied: Applied, patience: float
) -> None:
    """Run a step in a transaction of its own until it gets its locks, or as often as patience allows."""
    deadline = time.monotonic() + patience
    while True:
        expired = time.monotonic() >= deadline
        try:
            with _notices(connection) as notices, connection.transaction():
                _set_up(connection)
                apply()
            locked_out = [notice for notice in notices if notice.sqlstate in _NO_LOCK]
            applied.note([notice for notice in notices if expired or notice not in locked_out])
            if expired or not locked_out:
                return
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
            if expired:
                message = (
                    f"{error.diag.message_primary} within {patience:g} s: try again when less is going on"
                )
                raise OutOfReachError(message) from error
        time.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)


def _set_up(connection: Connection) -> None:
    """Set what a step depends on.

    Tables are looked up as whoever connects looks them up, messages are seen, no statement is cut off (a key
    may take long to be validated), and names and strings are read as they were written.
    """
    connection.execute(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL search_path TO DEFAULT; "
        "SET LOCAL client_min_messages = notice; "
        "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; "
        "SET LOCAL client_encoding = 'UTF8'; SET LOCAL standard_conforming_strings = on; "
        "SET LOCAL quote_all_identifiers = off"
    )
    if connection.info.server_version >= VERSION_17:
        connection.execute(SINCE_17)


@contextmanager
def _notices(connection: Connection) -> Iterator[list[_Notice]]:
    """Collect what the server reports beside the results."""
    notices: list[_Notice] = []

    def note(diagnostic: Diagnostic) -> None:  # which is valid during this call only
        severity, message = diagnostic.severity_nonlocalized, diagnostic.message_primary or ""
        notices.append(_Notice(severity, diagnostic.sqlstate, message))

    connection.add_notice_handler(note)
    try:
        yield notices
    finally:
        connection.remove_notice_handler(note)


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute("SELECT pg_catalog.set_config(%s, %s, true)", [name, value])


def _script(name: str) -> str:
    return files("loader").joinpath(name).read_text()
