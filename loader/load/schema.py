"""Creates or upgrades the tables (schema.sql, role.sql, reader.sql) and reads their version.

Never waits for a lock longer than a second at a time, because other sessions that need the table queue behind the
wait, and auth.users belongs to the application. Between attempts the application can proceed.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Final, Literal, NamedTuple

import psycopg
from psycopg import sql
from psycopg.errors import Diagnostic

from loader.errors import OutOfReachError
from loader.load import deviations
from loader.load.database import SINCE_17, VERSION_17, Connection

SCHEMA_VERSION: Final = 5
"""The version that schema.sql creates. This loader can also load into tables of every earlier version."""
PATIENCE: Final = 60.0
"""Seconds after which to give up on a lock that other sessions do not release."""
_PAUSE_SECONDS: Final = 1.0
"""Average pause between two attempts to get a lock: as long as an attempt, so others have half of the time."""
_STATEMENT: Final = re.compile(r"^DO \$(\w+)\$.*?^\$\1\$;$", re.MULTILINE | re.DOTALL)
_CREATING: Final = re.compile(
    r"^ *CREATE OR REPLACE (?:FUNCTION @[.](\w+).*?^(?:END|[$]function[$]);$|VIEW (\w+).*?;$)",
    re.MULTILINE | re.DOTALL,
)
_CREATED: Final = re.compile(r"CREATE OR REPLACE (?:VIEW|FUNCTION) (?:@[.])?(\w+)")
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
"""Reads the settings that the first statement of schema.sql stores for its transaction."""
_SUCCESS: Final = "00000"
"""The SQLSTATE of a RAISE NOTICE without a code."""

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
    """The result of applying the schema: versions (0: no tables), remembered choices, notes and warnings."""

    before: int = 0
    version: int = SCHEMA_VERSION
    foreign_keys: ForeignKeys = "on"
    identity: Identity = "required"
    layout: Layout = "plain"
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def note(self, notices: Sequence[_Notice]) -> None:
        """Keep notices raised by the scripts, not those about existing tables."""
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

    `foreign_keys`, `identity`, `layout` and `width` (of partitions) are choices to remember; None keeps the
    previous choice. New tables have the keys, require an identity, and are plain. Existing tables keep their
    layout. Partitions are created afterwards, by partitions.py.
    The connection must not be in a transaction: the tables and the questions use one, and each step of the
    keys another. Tables with rows get no new indexes here (see indexes.py). Raises psycopg.Error, and LoaderError
    for tables that cannot be loaded; nothing is changed then.
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
        connection.execute(statements["erasure"])
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


def created_names() -> frozenset[str]:
    """Return the names of the views and functions that schema.sql creates, in the schema of the tables."""
    return frozenset(_CREATED.findall(_script("schema.sql")))


def bind_again(connection: Connection, home: str, names: Iterable[str]) -> None:
    """Create views and functions of schema.sql again, so that they use the tables that have their names now.

    A view keeps to a table that is renamed. Other than applying the whole schema, which takes 0.2 s, this is done
    under a lock. `home` is the schema of the tables; the views and functions must be of this version. The
    caller's transaction has another search path afterwards. Raises psycopg.Error.
    """
    prefix = sql.Identifier(home).as_string(connection)
    texts = {match[1] or match[2]: match[0] for match in _CREATING.finditer(_script("schema.sql"))}
    for name in names:
        _set(connection, "search_path", _path_of(texts[name], prefix))
        connection.execute(texts[name].replace("@.", prefix.replace("'", "''") + ".").encode())


def _path_of(text: str, prefix: str) -> str:
    """Return the search path with which schema.sql creates something."""
    return "pg_catalog, pg_temp" if "FUNCTION @." in text else f"{prefix}, pg_temp"


def schema_version(connection: Connection) -> int:
    """Return the version of the tables, 0 if there are none. Raises psycopg.Error."""
    kinds: dict[str, str] = dict(connection.execute(_FOUND).fetchall())
    if kinds.get("analytics_schema") != "r":  # functions in a view would run with the caller's privileges
        return 1 if "analytics_loads" in kinds else 0
    statement = "SELECT coalesce(pg_catalog.max(version), 1) FROM analytics_schema"
    ((version,),) = connection.execute(statement).fetchall()
    return int(version)


def _until_locked(
    connection: Connection, apply: Callable[[], object], applied: Applied, patience: float
) -> None:
    """Run a step in its own transaction, and retry it until it gets its locks or the patience is over."""
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
                    f"{error.diag.message_primary} within {patience:g} s: try again when the database is "
                    "less busy"
                )
                raise OutOfReachError(message) from error
        time.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)


def _set_up(connection: Connection) -> None:
    """Set the settings that a step depends on.

    The role's own search path applies, notices are reported, no statement times out (validating a key may
    take long), and names and strings have their standard meaning.
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
    """Collect the server's notices."""
    notices: list[_Notice] = []

    def note(diagnostic: Diagnostic) -> None:  # valid only during this call
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
