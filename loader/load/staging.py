"""Rows of which some may exist: staged in a temporary table, compared by key, and inserted if they are new.

New rows are inserted in the order of their key, so that two loaders cannot deadlock. Counts are what
RETURNING yields, never a command tag (Citus reports rows that were not inserted).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from loader.load.copying import RowWriter, copy, copying
from loader.load.database import Connection
from loader.load.decode import Row
from loader.load.tables import Table

_SHOWN_CHARACTERS: Final = 300
"""Of a stored row that is in a row's way: its ids and the beginning of its payload. It may have megabytes,
and be in the way of a whole chunk."""


@dataclass(frozen=True)
class Collision:
    """A row whose key belongs to a row with another payload, which begins with `existing`."""

    position: int
    existing: str


@dataclass(frozen=True)
class Inserted:
    """Which rows were not inserted: duplicates, by position, and collisions."""

    duplicates: Sequence[int] = ()
    collisions: Sequence[Collision] = ()

    def __add__(self, other: Inserted) -> Inserted:
        return Inserted([*self.duplicates, *other.duplicates], [*self.collisions, *other.collisions])

    def positions(self) -> set[int]:
        return {*self.duplicates, *(collision.position for collision in self.collisions)}


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    """Insert rows, each once. Raises psycopg.Error, after which the rows are as they were before."""
    try:
        with connection.transaction():
            copy(connection, table, (row.copy for row in rows))
        return Inserted()
    except psycopg.errors.UniqueViolation:
        return insert_staged(connection, table, rows)


def insert_staged(connection: Connection, table: Table, rows: Iterable[Row]) -> Inserted:
    """As `insert`, for rows of which some are expected to exist. Raises as `Staging.insert`."""
    with connection.transaction():
        staging = Staging(connection, table)
        with staging.filling() as writer:
            for row in rows:
                writer.write(row)
        return staging.insert()


class Staging:
    """A temporary table for the rows of one batch, each with its position. To be used in one transaction."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._table = table
        self._writer: StagingWriter | None = None
        self._names = {
            "table": sql.Identifier(table.name),
            "staging": sql.Identifier(f"staging_{table.name}"),
            "key": sql.Identifier(table.key),
            "columns": sql.SQL(", ").join(map(sql.Identifier, table.columns)),
            "shown": sql.Literal(_SHOWN_CHARACTERS),
            "staged_payload": _payload("staged", table),
            "stored_payload": _payload("stored", table),
        }

    @contextmanager
    def filling(self) -> Iterator[StagingWriter]:
        """Open the temporary table for the rows of the batch. Raises psycopg.Error."""
        self._run(
            "CREATE TEMP TABLE IF NOT EXISTS {staging} ON COMMIT DELETE ROWS AS "
            "SELECT 0 AS position, {columns} FROM {table} WITH NO DATA"
        )
        self._run("TRUNCATE {staging}")
        columns = ("position", *self._table.columns)
        with copying(self._connection, f"staging_{self._table.name}", columns) as rows:
            self._writer = StagingWriter(rows)
            yield self._writer

    def insert(self) -> Inserted:
        """Compare what exists, insert what does not, then compare what occurred twice among the rows.

        Raises psycopg.errors.SerializationFailure if another loader interfered: try again.
        """
        assert self._writer is not None  # it was filled
        existing = self._compare("true")
        positions = existing.positions()
        new = [position for position in self._writer.first.values() if position not in positions]
        again = [position for position in self._writer.repeated if position not in positions]
        if new and self._insert_all_but([*positions, *again]) != len(new):
            raise psycopg.errors.SerializationFailure("another loader was faster with some rows: try again")
        repeated = self._compare("staged.position = ANY(%s)", again) if again else Inserted()
        if len(repeated.duplicates) + len(repeated.collisions) != len(again):
            raise psycopg.errors.SerializationFailure("rows were removed while they were loaded: try again")
        return existing + repeated

    def _compare(self, which: LiteralString, *values: object) -> Inserted:
        """Return the rows whose key exists, with an equal payload or with another one.

        OFFSET 0 keeps the planner, which knows nothing of a fresh temporary table, from scanning the whole
        table: each key is looked up in the index.
        """
        equal, unequal, stored = self._run(
            "WITH compared AS MATERIALIZED (SELECT staged.position, "
            "CASE WHEN ({staged_payload}) IS DISTINCT FROM ({stored_payload}) "
            "THEN left(stored::text, {shown}) END AS other "
            "FROM {staging} staged CROSS JOIN LATERAL "
            "(SELECT * FROM {table} found WHERE found.{key} = staged.{key} OFFSET 0) AS stored "
            f"WHERE {which}) SELECT array_agg(position) FILTER (WHERE other IS NULL), "
            "array_agg(position) FILTER (WHERE other IS NOT NULL), "
            "array_agg(other) FILTER (WHERE other IS NOT NULL) FROM compared",
            *values,
        ).fetchall()[0]
        return Inserted(equal or [], list(map(Collision, unequal or [], stored or [])))

    def _insert_all_but(self, positions: Sequence[int]) -> int:
        """Insert in the order of the key; return how many rows are new."""
        return self._run(
            "INSERT INTO {table} ({columns}) SELECT {columns} FROM {staging} "
            "WHERE NOT EXISTS (SELECT FROM unnest(%s::int[]) AS but WHERE but = position) "
            "ORDER BY {key} ON CONFLICT ({key}) DO NOTHING RETURNING 1",
            list(positions),
        ).rowcount  # of a statement that returns rows: the rows that came, not a command tag

    def _run(self, statement: LiteralString, *values: object) -> psycopg.Cursor[Any]:
        return self._connection.execute(sql.SQL(statement).format(**self._names), values)


class StagingWriter:
    """Sends rows with their positions, and notes the first position of each key."""

    def __init__(self, rows: RowWriter) -> None:
        self.first: dict[str, int] = {}
        self.repeated: list[int] = []
        """Positions of rows whose key an earlier row has."""
        self._rows = rows
        self._position = 0

    def write(self, row: Row) -> None:
        """Raises psycopg.Error."""
        position = self._position
        if self.first.setdefault(row.event_id, position) != position:
            self.repeated.append(position)
        self._rows.write(f"{position}\t{row.copy}")
        self._position += 1


def _payload(alias: str, table: Table) -> sql.Composable:
    return sql.SQL(", ").join(sql.Identifier(alias, column) for column in table.payload)
