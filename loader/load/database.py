"""Connections, and the settings on which the loader's transactions depend.

A role, a database, a server or a pooler can change any setting, so each transaction sets them itself, with
SET LOCAL: a pooler in transaction mode passes its connections on to other clients, which must not inherit
them.

  setting                             set to              why
  ----------------------------------- ------------------  ------------------------------------------------
  statement_timeout                   0                   one COPY may take longer; a batch is bounded by
  transaction_timeout (17)            0                   its chunks, not by time. The loader decodes and
  idle_in_transaction_session_timeout 0                   syncs rejects between two statements
  lock_timeout                        60 s                a lock held for long is reported, then retried
  transaction_isolation               read committed      a row that another loader commits must be visible
                                                          to the next statement, which compares it
  synchronous_commit                  on, unless stronger the file is removed after COMMIT. off, local and
                                                          remote_write may lose what is committed, also on
                                                          failover; remote_apply stays
  search_path                         pg_catalog, the     names mean the system's functions and these tables;
                                      tables' schema, the a temporary table shadows nothing. The session's
                                      session's, pg_temp  schemas are kept for triggers of the tables
  row_security                        on                  off refuses each query of a table with a policy
  client_encoding                     UTF8                lines are UTF-8; psycopg encodes with the client's
  standard_conforming_strings         on                  psycopg doubles backslashes of bytea otherwise, and
                                                          the ledger's digests would be other bytes
  DateStyle, TimeZone                 ISO, UTC            rows as text (collisions), timestamps that are read
  extra_float_digits                  1                   rates and clocks that are read
  quote_all_identifiers               off                 names of types that are compared
  jit                                 off                 compiling takes longer than looking up a batch
  exit_on_error                       off                 a duplicate must not end the session
  constraints                         immediate           at COMMIT, one row would fail all the others

Not set: default_transaction_read_only (an administrator protects a server, or its disk is full: the loader
waits), session_replication_role and fsync (only a superuser may set them; `loader doctor` reports them),
idle_session_timeout (a closed idle connection is reopened silently), bytea_output and IntervalStyle (no value
depends on them), tablespaces and planner settings (they only affect speed).

Statements qualify functions with their schema, and compare only types with an exact operator. So no function
or operator that another user creates in another schema is a better match (CVE-2018-1058).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

import psycopg
from psycopg import sql

from loader.load.sqlstate import is_internal

Connection = psycopg.Connection[tuple[Any, ...]]
Isolation = Literal["READ COMMITTED", "REPEATABLE READ"]

_SETTINGS: Final = b"""
    SET LOCAL statement_timeout = 0;
    SET CONSTRAINTS ALL IMMEDIATE;
    SET LOCAL idle_in_transaction_session_timeout = 0;
    SET LOCAL lock_timeout = '60s';
    SET LOCAL row_security = on;
    SET LOCAL client_encoding = 'UTF8';
    SET LOCAL standard_conforming_strings = on;
    SET LOCAL DateStyle = 'ISO, YMD';
    SET LOCAL TimeZone = 'UTC';
    SET LOCAL extra_float_digits = 1;
    SET LOCAL quote_all_identifiers = off;
    SET LOCAL jit = off;
    SET LOCAL exit_on_error = off;
"""
VERSION_17: Final = 17_00_00
SINCE_17: Final = b"SET LOCAL transaction_timeout = 0;"
_ON_WORKERS: Final = b"SET LOCAL citus.propagate_set_commands = 'local';"
"""Citus sends what follows to the workers, with the BEGIN of their transactions."""
_DURABLE: Final = b"""
    SELECT pg_catalog.set_config('synchronous_commit', 'on', true)
    WHERE pg_catalog.current_setting('synchronous_commit') IN ('off', 'local', 'remote_write');
"""
_SESSION_SCHEMAS: Final = "SELECT pg_catalog.current_schemas(false)::pg_catalog.text[]"
_FIND_PATH: Final = """
    WITH session AS (
        SELECT name, place FROM unnest(%s::name[]) WITH ORDINALITY AS found (name, place)
        WHERE name <> 'pg_catalog' AND name !~ '^pg_temp'
    ), home AS (
        SELECT nspname AS name, (SELECT place FROM session WHERE name = nspname) AS place
        FROM pg_namespace JOIN pg_class ON relnamespace = pg_namespace.oid
        WHERE relname IN ('analytics_events', 'analytics_loads')
            AND relkind IN ('r', 'p', 'v', 'f') AND relpersistence <> 't'
        GROUP BY nspname HAVING count(*) = 2 ORDER BY place NULLS LAST, name LIMIT 1
    ), path AS (
        SELECT name, 0 AS place FROM home
        UNION ALL SELECT name, place FROM session WHERE name NOT IN (SELECT name FROM home)
        UNION ALL VALUES ('pg_catalog', -1), ('pg_temp', 1 << 20)
    )
    SELECT string_agg(quote_ident(name), ', ' ORDER BY place) FROM path
"""
_HAS_COLUMN: Final = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute "
    "WHERE attrelid = pg_catalog.to_regclass(%s::text)::pg_catalog.oid AND attname = %s::name AND NOT attisdropped)"
)
_HAS_CITUS: Final = "SELECT pg_catalog.to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
_IS_DISTRIBUTED: Final = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_partition "
    "WHERE logicalrelid = pg_catalog.to_regclass('analytics_events'))"
)
_scripts: WeakKeyDictionary[Connection, bytes] = WeakKeyDictionary()
"""The statement that sets the settings, by connection. If the tables move, the connection gets an error and
is replaced."""
_distributed: WeakKeyDictionary[Connection, bool] = WeakKeyDictionary()
"""Whether Citus distributes the tables that a connection found."""


class NodeFailedError(psycopg.OperationalError):
    """A node of Citus failed, or left a transaction half rolled back: try again with a new connection."""


class _ReportingConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that reports whenever the server answers or accepts rows.

    Every wait in psycopg ends here; a COPY waits at least once per MiB (psycopg 3.3).
    """

    progressed: Callable[[], None] = staticmethod(lambda: None)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().wait(*args, **kwargs)
        self.progressed()
        return answer


def connect(dsn: str, progressed: Callable[[], None] = lambda: None) -> Connection:
    """Connect; `progressed` is called whenever the server makes progress. Raises psycopg.OperationalError."""
    # A pooler may not keep prepared statements.
    connection = _ReportingConnection.connect(dsn, prepare_threshold=None)
    connection.progressed = progressed
    return connection


@contextmanager
def transaction(connection: Connection, isolation: Isolation = "READ COMMITTED") -> Iterator[None]:
    """Open a transaction with the settings in `_SETTINGS`.

    A refresh of the rollups needs a single snapshot: REPEATABLE READ.

    Raises psycopg.Error, also if the server crashes at the end of a COPY, when psycopg 3.3 may raise
    ValueError because the connection no longer has a socket. Raises NodeFailedError for an internal error of
    Citus.
    """
    try:
        with connection.transaction():
            prepare(connection, isolation)
            yield
    except psycopg.Error as error:
        if is_distributed(connection) and is_internal(error):
            raise NodeFailedError(f"a node of Citus failed: {error.diag.message_primary}") from error
        raise
    except Exception as error:
        if connection.closed:
            raise psycopg.OperationalError(f"the connection was lost: {error}") from error
        raise


def prepare(connection: Connection, isolation: Isolation = "READ COMMITTED") -> None:
    """Set the settings of a loader transaction; call it first. Raises psycopg.Error.

    Takes one round trip, 0.1 ms, and some more on the first use of a connection.
    """
    level = f"SET TRANSACTION ISOLATION LEVEL {isolation};".encode()
    if (script := _scripts.get(connection)) is None:
        connection.execute(level + _SETTINGS)  # the level cannot be set once a query has run
        script = _scripts[connection] = _script(connection)
    connection.execute(level + script)


def has_column(connection: Connection, table: str, column: str) -> bool:
    """Whether a table or view has a column; earlier versions may lack it. Raises psycopg.Error."""
    return connection.execute(_HAS_COLUMN, [table, column]).fetchone() == (True,)


def is_distributed(connection: Connection) -> bool:
    """Whether Citus distributes the tables. Known once `prepare` or `search_path` was called."""
    return _distributed.get(connection, False)


def _script(connection: Connection) -> bytes:
    path = sql.SQL("SET LOCAL search_path = {};").format(sql.SQL(search_path(connection)))
    script = _settings(connection) + _DURABLE + path.as_bytes(connection)
    return (_ON_WORKERS if is_distributed(connection) else b"") + script


def _settings(connection: Connection) -> bytes:
    return _SETTINGS + (SINCE_17 if connection.info.server_version >= VERSION_17 else b"")


def search_path(connection: Connection) -> Any:
    """Return a search path: pg_catalog, the schema of the tables, the session's other schemas, and pg_temp.

    The tables are found in any schema, so a changed search path does not hide them. Call it in a transaction,
    whose search path it changes. Raises psycopg.Error.
    """
    connection.execute(_settings(connection))  # the isolation level cannot be set once a query has run
    ((schemas,),) = connection.execute(_SESSION_SCHEMAS).fetchall()
    connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    ((path,),) = connection.execute(_FIND_PATH, [schemas]).fetchall()
    connection.execute(f"SET LOCAL search_path = {path}".encode())
    _distributed[connection] = all(
        connection.execute(statement).fetchone() == (True,) for statement in (_HAS_CITUS, _IS_DISTRIBUTED)
    )
    return path
