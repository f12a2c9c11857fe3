"""Every SQL statement of a load. Nothing here looks inside a line.

Rows go straight into the table under a savepoint. Only a unique violation takes the staging path: COPY into a
temporary table, then insert what is new in the order of its key, so that two loaders can't deadlock. Counts
are what RETURNING gives, never a command tag (Citus reports rows that were not inserted).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import islice
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from loader.decode import EVENT_COLUMNS, METRIC_COLUMNS, Row

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Table:
    """A table that is loaded: columns in COPY's order, the key that makes a row unique, a row's kind."""

    name: str
    columns: tuple[str, ...]
    key: str
    kind: str


SCHEMA_VERSION: Final = 2
"""What schema.sql makes. Rows of this version load into the tables of any version there was."""
_BLOCK_ROWS: Final = 256
"""Rows that are sent at once, some 64 KiB: a write per row costs a microsecond for each."""
EVENTS: Final = Table("analytics_events", EVENT_COLUMNS, "event_id", "event_type")
METRICS: Final = Table("analytics_metrics", METRIC_COLUMNS, "id", "metric_name")


@dataclass(frozen=True)
class Collision:
    """A row whose key is taken by a row with another payload, which is `existing`."""

    position: int
    existing: str


@dataclass(frozen=True)
class Inserted:
    """Which rows were not inserted: equal ones that were there, by position, and collisions."""

    duplicates: Sequence[int] = ()
    collisions: Sequence[Collision] = ()


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: what became of the lines of one chunk."""

    digest: bytes
    file: str
    byte_offset: int
    bytes: int
    lines: int
    events: int
    metrics: int
    duplicates: int
    rejected: int


_ENTRY_TYPES: Final = {
    field.name: {"digest": "bytea", "file": "text"}.get(field.name, "bigint") for field in fields(Entry)
}
_RECORD: Final = sql.SQL(
    "INSERT INTO analytics_loads ({}, loader_host) SELECT entry.*, %s FROM unnest({}) AS entry "
    "ON CONFLICT (digest) DO NOTHING RETURNING 1"
).format(
    sql.SQL(", ").join(map(sql.Identifier, _ENTRY_TYPES)),
    sql.SQL(", ").join(sql.SQL(f"%s::{kind}[]") for kind in _ENTRY_TYPES.values()),
)


class _Told(psycopg.Connection[tuple[Any, ...]]):
    """A connection that tells when the server has answered, or taken rows: each wait of psycopg's ends here.

    A COPY waits for every MiB at least (psycopg 3.3).
    """

    progressed: Callable[[], None] = staticmethod(lambda: None)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().wait(*args, **kwargs)
        self.progressed()
        return answer


def connect(dsn: str, progressed: Callable[[], None] = lambda: None) -> Connection:
    """Connect; `progressed` is called whenever the server moves on. Raises psycopg.OperationalError."""
    # A pooler in between may not keep prepared statements.
    connection = _Told.connect(dsn, prepare_threshold=None)
    connection.progressed = progressed
    return connection


def apply_schema(connection: Connection, *, foreign_keys: bool = True, role: str | None = None) -> None:
    """Apply schema.sql in one transaction, and role.sql for a role; safe to repeat. Raises psycopg.Error."""
    with connection.transaction():
        _set(connection, "analytics.foreign_keys", "on" if foreign_keys else "off")
        connection.execute(_script("schema.sql"))
        if role is not None:
            _set(connection, "analytics.role", role)
            connection.execute(_script("role.sql"))


def schema_version(connection: Connection) -> int:
    """Return the version of the tables, 0 where there are none. Raises psycopg.Error."""
    found = "SELECT to_regclass('analytics_schema'), to_regclass('analytics_loads')"
    ((versions, ledger),) = connection.execute(found).fetchall()
    if versions is None:
        return 0 if ledger is None else 1
    ((version,),) = connection.execute("SELECT coalesce(max(version), 1) FROM analytics_schema").fetchall()
    return int(version)


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute("SELECT set_config(%s, %s, true)", [name, value])


def _script(name: str) -> bytes:
    return files("loader").joinpath(name).read_bytes()


def prepare(connection: Connection) -> None:
    """Set what holds for a load's transaction.

    Deferrable constraints are checked by each statement: at COMMIT, one row would fail all others. A plan is
    not compiled: that takes longer than looking up the rows of a batch. A lock that somebody holds for long
    is given up and asked for again, so that it is told what is waited for.
    """
    connection.execute("SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL jit = off; SET LOCAL lock_timeout = '60s'")


def copy(connection: Connection, table: Table, copies: Iterable[str]) -> None:
    """Copy rows straight into the table, as they come. Raises psycopg.Error for the first that can't be."""
    _copy(connection, table.name, table.columns, copies)


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    """Insert rows, each once. Raises psycopg.Error, after which the rows are as they were before."""
    try:
        with connection.transaction():
            copy(connection, table, (row.copy for row in rows))
        return Inserted()
    except psycopg.errors.UniqueViolation:
        return insert_staged(connection, table, rows)


def insert_staged(connection: Connection, table: Table, rows: Iterable[Row]) -> Inserted:
    """As `insert`, for rows of which some are expected to be there already; they are sent as they come.

    Raises psycopg.errors.SerializationFailure where another loader got in between: try again.
    """
    with connection.transaction():
        return _Staging(connection, table).insert(rows)


def _copy(connection: Connection, name: str, columns: Iterable[str], copies: Iterable[str]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(name), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    rest = iter(copies)
    with connection.cursor().copy(statement) as copying:
        while block := list(islice(rest, _BLOCK_ROWS)):
            block.append("")
            copying.write("\n".join(block))


def existing(connection: Connection, table: Table, keys: Sequence[str]) -> set[str]:
    """Return those of some keys, canonical UUIDs, that have a row already. Raises psycopg.Error."""
    if not keys:
        return set()
    statement = sql.SQL(
        "SELECT found.key::text FROM unnest(%s::uuid[]) AS wanted CROSS JOIN LATERAL "
        "(SELECT {key} AS key FROM {table} WHERE {key} = wanted OFFSET 0) AS found"
    ).format(key=sql.Identifier(table.key), table=sql.Identifier(table.name))
    return {key for (key,) in connection.execute(statement, ["{" + ",".join(keys) + "}"])}


class _Staging:
    """A temporary table for the rows of one batch, each with its position."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._table = table
        self._names = {
            "table": sql.Identifier(table.name),
            "staging": sql.Identifier(f"staging_{table.name}"),
            "key": sql.Identifier(table.key),
            "columns": sql.SQL(", ").join(map(sql.Identifier, table.columns)),
            "staged_payload": _payload("staged", table),
            "stored_payload": _payload("stored", table),
        }

    def insert(self, rows: Iterable[Row]) -> Inserted:
        """Compare what is there already, insert what is not, compare what stood twice among the rows."""
        first: dict[str, int] = {}
        repeated = self._fill(rows, first)
        there = self._compare("true")
        there_at = {*there.duplicates, *(collision.position for collision in there.collisions)}
        new = [position for position in first.values() if position not in there_at]
        again = [position for position in repeated if position not in there_at]
        if new and self._insert_all_but([*there_at, *again]) != len(new):
            raise psycopg.errors.SerializationFailure("another loader was faster with some rows: try again")
        stood_twice = self._compare("staged.position = ANY(%s)", again) if again else Inserted()
        if len(stood_twice.duplicates) + len(stood_twice.collisions) != len(again):
            raise psycopg.errors.SerializationFailure("rows were removed while they were loaded: try again")
        return Inserted(
            [*there.duplicates, *stood_twice.duplicates], [*there.collisions, *stood_twice.collisions]
        )

    def _fill(self, rows: Iterable[Row], first: dict[str, int]) -> list[int]:
        """Copy the rows; note each key's first position, and return those of the others."""
        repeated: list[int] = []

        def copies() -> Iterator[str]:
            for position, row in enumerate(rows):
                if first.setdefault(row.event_id, position) != position:
                    repeated.append(position)
                yield f"{position}\t{row.copy}"

        self._run(
            "CREATE TEMP TABLE IF NOT EXISTS {staging} ON COMMIT DELETE ROWS AS "
            "SELECT 0 AS position, {columns} FROM {table} WITH NO DATA"
        )
        self._run("TRUNCATE {staging}")
        _copy(self._connection, f"staging_{self._table.name}", ("position", *self._table.columns), copies())
        return repeated

    def _compare(self, which: LiteralString, *values: object) -> Inserted:
        """Return the rows whose key is there, with an equal payload or with another one.

        OFFSET 0 keeps the planner, which knows nothing of a fresh temporary table, from scanning the whole
        table: each key is looked up in the index.
        """
        equal, unequal, stored = self._run(
            "WITH compared AS MATERIALIZED (SELECT staged.position, "
            "CASE WHEN ({staged_payload}) IS DISTINCT FROM ({stored_payload}) THEN stored::text END AS other "
            "FROM {staging} staged CROSS JOIN LATERAL "
            "(SELECT * FROM {table} found WHERE found.{key} = staged.{key} OFFSET 0) AS stored "
            f"WHERE {which}) SELECT array_agg(position) FILTER (WHERE other IS NULL), "
            "array_agg(position) FILTER (WHERE other IS NOT NULL), "
            "array_agg(other) FILTER (WHERE other IS NOT NULL) FROM compared",
            *values,
        ).fetchall()[0]
        return Inserted(equal or [], list(map(Collision, unequal or [], stored or [])))

    def _insert_all_but(self, positions: Sequence[int]) -> int:
        """Insert in the order of the key, so that two loaders can't deadlock; return how many are new."""
        return self._run(
            "INSERT INTO {table} ({columns}) SELECT {columns} FROM {staging} "
            "WHERE NOT EXISTS (SELECT FROM unnest(%s::int[]) AS but WHERE but = position) "
            "ORDER BY {key} ON CONFLICT ({key}) DO NOTHING RETURNING 1",
            list(positions),
        ).rowcount  # of a statement that returns rows: the rows that came, no command tag

    def _run(self, statement: LiteralString, *values: object) -> psycopg.Cursor[Any]:
        return self._connection.execute(sql.SQL(statement).format(**self._names), values)


def _payload(alias: str, table: Table) -> sql.Composable:
    """What makes two rows with one key equal: every column but the keys."""
    columns = (column for column in table.columns if column not in ("id", "event_id"))
    return sql.SQL(", ").join(sql.Identifier(alias, column) for column in columns)


def known(connection: Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Return those digests whose chunks the ledger has already. Raises psycopg.Error."""
    found = connection.execute("SELECT digest FROM analytics_loads WHERE digest = ANY(%s)", [list(digests)])
    return {digest for (digest,) in found}


def record(connection: Connection, entries: Sequence[Entry]) -> None:
    """Write the ledger's rows.

    Raises psycopg.errors.SerializationFailure where another loader was faster with the same bytes: try again,
    then they are known.
    """
    if not entries:
        return
    arrays = [[getattr(entry, name) for entry in entries] for name in _ENTRY_TYPES]
    written = connection.execute(_RECORD, [socket.gethostname(), *arrays]).fetchall()
    if len(written) != len(entries):
        raise psycopg.errors.SerializationFailure("another loader was faster with these lines: try again")
