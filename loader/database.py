"""Every SQL statement of the loader. Nothing here looks inside a line.

Rows go straight into the table under a savepoint. Only a unique violation takes the staging path: COPY into a
temporary table, then insert what is new in the order of its key, so that two loaders can't deadlock. Counts
are what RETURNING gives, never a command tag (Citus reports rows that were not inserted).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any, Final

import psycopg
from psycopg import sql

from loader.decode import EVENT_COLUMNS, METRIC_COLUMNS, Row

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Table:
    """A table that is loaded: its columns in COPY's order and the key that makes a row unique."""

    name: str
    columns: tuple[str, ...]
    key: str


EVENTS: Final = Table("analytics_events", EVENT_COLUMNS, "event_id")
METRICS: Final = Table("analytics_metrics", METRIC_COLUMNS, "id")


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


def connect(dsn: str) -> Connection:
    """Connect. Raises psycopg.OperationalError."""
    return psycopg.connect(dsn, prepare_threshold=None)  # a pooler between may not keep prepared statements


def apply_schema(connection: Connection, *, foreign_keys: bool = True) -> None:
    """Apply schema.sql in one transaction; safe to repeat. Raises psycopg.Error."""
    script = files("loader").joinpath("schema.sql").read_text()
    with connection.transaction():
        connection.execute(
            "SELECT set_config('analytics.foreign_keys', %s, true)", ["on" if foreign_keys else "off"]
        )
        connection.execute(script.encode())


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    """Insert rows, each once. Raises psycopg.Error, after which the rows are as they were before."""
    try:
        with connection.transaction():
            _copy(connection, table.name, table.columns, (row.copy for row in rows))
        return Inserted()
    except psycopg.errors.UniqueViolation:
        with connection.transaction():
            return _insert_staged(connection, table, rows)


def _copy(connection: Connection, name: str, columns: Iterable[str], lines: Iterable[str]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(name), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor().copy(statement) as copy:
        for line in lines:
            copy.write(line + "\n")


def _insert_staged(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    names = {
        "table": sql.Identifier(table.name),
        "staging": sql.Identifier(f"staging_{table.name}"),
        "key": sql.Identifier(table.key),
        "columns": sql.SQL(", ").join(map(sql.Identifier, table.columns)),
        "staged_payload": _payload("staged", table),
        "stored_payload": _payload("stored", table),
    }

    def run(statement: str, *values: object) -> list[tuple[Any, ...]]:
        cursor = connection.execute(sql.SQL(statement).format(**names), values)
        return cursor.fetchall() if cursor.description else []

    run(
        "CREATE TEMP TABLE IF NOT EXISTS {staging} ON COMMIT DROP AS "
        "SELECT 0 AS position, {columns} FROM {table} WITH NO DATA"
    )
    run("TRUNCATE {staging}")
    _copy(
        connection,
        f"staging_{table.name}",
        ("position", *table.columns),
        (f"{position}\t{row.copy}" for position, row in enumerate(rows)),
    )
    new = {
        key
        for (key,) in run(
            "INSERT INTO {table} ({columns}) SELECT {columns} FROM ("
            "SELECT DISTINCT ON ({key}) * FROM {staging} ORDER BY {key}, position) AS first "
            "ORDER BY {key} ON CONFLICT ({key}) DO NOTHING RETURNING {key}::text"
        )
    }
    left = _left_over(rows, new)
    compared = run(
        "SELECT staged.position, CASE WHEN ({staged_payload}) IS DISTINCT FROM ({stored_payload}) "
        "THEN stored::text END FROM {staging} staged JOIN {table} stored USING ({key}) "
        "WHERE staged.position = ANY(%s) ORDER BY staged.position",
        left,
    )
    if len(compared) != len(left):
        raise psycopg.errors.SerializationFailure("rows were removed while they were loaded: try again")
    return Inserted(
        [position for position, existing in compared if existing is None],
        [Collision(position, existing) for position, existing in compared if existing is not None],
    )


def _left_over(rows: Sequence[Row], new: set[str]) -> list[int]:
    """The positions of the rows that were not inserted: all but the first one of each new key."""
    left = []
    for position, row in enumerate(rows):
        if row.event_id in new:
            new.remove(row.event_id)
        else:
            left.append(position)
    return left


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
    columns = [field.name for field in fields(Entry)]
    host = socket.gethostname()
    statement = sql.SQL(
        "INSERT INTO analytics_loads ({}, loader_host) VALUES ({}) "
        "ON CONFLICT (digest) DO NOTHING RETURNING 1"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join([sql.Placeholder()] * (len(columns) + 1)),
    )
    for entry in entries:
        values = [getattr(entry, column) for column in columns]
        if connection.execute(statement, [*values, host]).fetchone() is None:
            raise psycopg.errors.SerializationFailure("another loader was faster with these lines: try again")
