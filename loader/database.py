"""Every SQL statement of the loader. Nothing here looks inside a line.

Rows go straight into the table under a savepoint. Only a unique violation takes the staging path: COPY into a
temporary table, then insert what is new in the order of its key, so that two loaders can't deadlock. Counts
are what RETURNING gives, never a command tag (Citus reports rows that were not inserted).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    """A staged row whose key is taken by a row with another payload."""

    position: int
    existing: str


@dataclass(frozen=True)
class Inserted:
    """What became of rows that were copied: new ones, equal ones that were there, and collisions."""

    new: int
    duplicates: int = 0
    collisions: Sequence[Collision] = ()


def apply_schema(connection: Connection) -> None:
    """Apply schema.sql in one transaction; safe to repeat. Raises psycopg.Error."""
    script = files("loader").joinpath("schema.sql").read_text()
    with connection.transaction():
        connection.execute(script.encode())


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    """Insert rows, each once. Raises psycopg.Error, after which the rows are as they were before."""
    try:
        with connection.transaction():
            _copy(connection, table.name, table.columns, (row.copy for row in rows))
        return Inserted(len(rows))
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
        "payload_s": _payload("s", table),
        "payload_t": _payload("t", table),
    }

    def run(statement: str) -> list[tuple[Any, ...]]:
        cursor = connection.execute(sql.SQL(statement).format(**names))
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
    new = len(
        run(
            "INSERT INTO {table} ({columns}) SELECT {columns} FROM ("
            "SELECT DISTINCT ON ({key}) * FROM {staging} ORDER BY {key}, position) AS first "
            "ORDER BY {key} ON CONFLICT ({key}) DO NOTHING RETURNING 1"
        )
    )
    equal = run(
        "SELECT s.position FROM {staging} s JOIN {table} t USING ({key}) "
        "WHERE ({payload_s}) IS NOT DISTINCT FROM ({payload_t}) ORDER BY s.position"
    )
    other = run(
        "SELECT s.position, t::text FROM {staging} s JOIN {table} t USING ({key}) "
        "WHERE ({payload_s}) IS DISTINCT FROM ({payload_t}) ORDER BY s.position"
    )
    if len(equal) + len(other) != len(rows):
        raise psycopg.errors.SerializationFailure("rows were removed while they were loaded: try again")
    return Inserted(new, len(equal) - new, [Collision(*row) for row in other])


def _payload(alias: str, table: Table) -> sql.Composable:
    """What makes two rows with one key equal: every column but the keys."""
    columns = (column for column in table.columns if column not in ("id", "event_id"))
    return sql.SQL(", ").join(sql.Identifier(alias, column) for column in columns)
