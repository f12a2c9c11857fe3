"""Stages rows in a temporary table, compares them by key with existing rows, and inserts the new ones.

New rows are inserted in the order of their key, so that two loaders cannot deadlock. A row is counted as
stored if RETURNING yields it and, on a table with triggers, if its key is found afterwards. A command tag is
never used (Citus reports rows that were not inserted).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from loader.load.copying import RowWriter, copying, existing_ids, in_range
from loader.load.database import Connection, is_distributed
from loader.load.decode import Reject, Row
from loader.load.tables import FILLED_IN, Table
from loader.load.triggers import triggers

_ATTEMPTS: Final = 20
"""Number of repeated comparisons if other loaders commit some of the rows in between."""

_SHOWN_CHARACTERS: Final = 300
"""Characters shown of a colliding stored row: its ids and the beginning of its payload. It may have megabytes
and collide with a whole chunk."""


@dataclass(frozen=True)
class Collision:
    """A row whose key belongs to a stored row with a different payload; `existing` is the beginning of that row."""

    position: int
    existing: str


@dataclass(frozen=True)
class Inserted:
    """The rows that were not inserted, by position: duplicates, collisions and refused ones."""

    duplicates: Sequence[int] = ()
    collisions: Sequence[Collision] = ()
    refused: dict[int, Reject] = field(default_factory=dict)

    def __add__(self, other: Inserted) -> Inserted:
        return Inserted(
            [*self.duplicates, *other.duplicates],
            [*self.collisions, *other.collisions],
            self.refused | other.refused,
        )

    def positions(self) -> set[int]:
        return {*self.duplicates, *(collision.position for collision in self.collisions), *self.refused}


class NotStoredError(Exception):
    """The table accepted rows without storing them."""


class _InterferenceError(Exception):
    """Another loader committed or removed some of the rows after they were compared."""


def insert_staged(connection: Connection, table: Table, rows: Iterable[Row]) -> Inserted:
    """Insert rows, each once. Raises as `Staging.insert` does; then no row is inserted."""
    with connection.transaction():
        staging = Staging(connection, table)
        with staging.filling() as writer:
            for row in rows:
                writer.write(row)
        return staging.insert()


class Staging:
    """A temporary table for the rows of one batch, each with its position. Valid within one transaction."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self.connection = connection
        self.table = table
        self.name: Final = sql.Identifier("pg_temp", f"staging_{table.name}")
        self.keys: dict[int, str] = {}
        """The key of each row, by position."""
        self._names = {
            "table": sql.Identifier(table.name),
            "all_columns": sql.Literal(list(table.columns)),
            "table_name": sql.Literal(table.name),
            "staging": self.name,
            "staging_name": sql.Literal(f"pg_temp.staging_{table.name}"),
            "key": sql.Identifier(table.key),
            "all": sql.SQL(", ").join(map(sql.Identifier, table.columns)),
            "shown": sql.Literal(_SHOWN_CHARACTERS),
            "differ": _differ(table),
        }

    @contextmanager
    def filling(self) -> Iterator[StagingWriter]:
        """Open the temporary table for the rows of the batch. Raises psycopg.Error."""
        self.create()
        columns = ("position", *self.table.columns)
        with copying(self.connection, self.name, columns) as rows:
            yield StagingWriter(rows, self.keys)

    def create(self) -> None:
        """Create the temporary table, or empty it; recreate it if the columns of the table have changed."""
        ((stale,),) = self.run(_STALE).fetchall()
        if stale:
            self.run("DROP TABLE {staging}")
        self.run(
            "CREATE TEMP TABLE IF NOT EXISTS {staging} ON COMMIT DELETE ROWS AS "
            "SELECT 0 AS position, {all} FROM {table} WITH NO DATA"
        )
        self.run("TRUNCATE {staging}")

    def discard(self, positions: Iterable[int]) -> None:
        """Remove rows from the staging table."""
        gone = list(positions)
        self.run("DELETE FROM {staging} WHERE position = ANY(%s::int[])", gone)
        for position in gone:
            del self.keys[position]

    def insert(self) -> Inserted:
        """Compare existing rows, insert new ones, then compare rows whose key is repeated within the batch.

        Rows that other loaders commit in the meantime are compared again. Raises NotStoredError, and
        psycopg.Error: for a refused row, and SerializationFailure if the others keep interfering.
        """
        for _ in range(_ATTEMPTS):
            with suppress(_InterferenceError), self.connection.transaction():
                return self._insert_once()
        raise psycopg.errors.SerializationFailure("other loaders keep changing these rows: try again")

    def _insert_once(self) -> Inserted:
        existing = self.compare()
        settled = existing.positions()
        first: dict[str, int] = {}
        again = []
        for position, key in self.keys.items():
            if position not in settled and first.setdefault(key, position) != position:
                again.append(position)
        if first:
            self._store([*settled, *again], list(first.values()))
        return existing + self._compare_repeated(again) if again else existing

    def _store(self, others: Sequence[int], new: Sequence[int]) -> None:
        """Insert the new rows, and check that the table has stored them."""
        stored = self._insert_all_but(others)
        watched = triggers(self.connection, self.table)
        if stored == len(new) and not watched:
            return
        if watched and self.absent(new):
            raise NotStoredError
        if stored != len(new):
            raise _InterferenceError

    def _compare_repeated(self, again: Sequence[int]) -> Inserted:
        """Compare rows whose key is that of an earlier row of the batch, which was stored."""
        compared = self.compare(again)
        if len(compared.positions()) != len(again):
            raise _InterferenceError
        return compared

    def compare(self, positions: Sequence[int] | None = None) -> Inserted:
        """Return the rows (all, or those at some positions) whose key exists, as duplicates and collisions.

        The rows of the table are found by _STORED, or by _STORED_DISTRIBUTED on Citus.
        """
        if not self.keys:
            return Inserted()
        equal, unequal, stored = self.run(
            "WITH compared AS MATERIALIZED (SELECT staged.position, "
            "CASE WHEN {differ} THEN pg_catalog.left(stored::text, {shown}) END AS other "
            "FROM {staging} staged {stored} "
            "WHERE %s::int[] IS NULL OR position = ANY(%s::int[])) "
            "SELECT pg_catalog.array_agg(position) FILTER (WHERE other IS NULL), "
            "pg_catalog.array_agg(position) FILTER (WHERE other IS NOT NULL), "
            "pg_catalog.array_agg(other) FILTER (WHERE other IS NOT NULL) FROM compared",
            positions and list(positions), positions and list(positions), stored=self._stored(),
        ).fetchall()[0]  # fmt: skip
        return Inserted(equal or [], list(map(Collision, unequal or [], stored or [])))

    def _stored(self) -> sql.Composed:
        """Return the join of staged rows with those of the table that have their keys."""
        join = _STORED_DISTRIBUTED if is_distributed(self.connection) else _STORED
        return self.format(join, in_range=in_range(self.table, self.keys.values(), "found"))

    def absent(self, positions: Sequence[int]) -> list[int]:
        """Return the positions whose key is not in the table."""
        found = existing_ids(self.connection, self.table, [self.keys[position] for position in positions])
        return [position for position in positions if self.keys[position] not in found]

    def _insert_all_but(self, positions: Sequence[int]) -> int:
        """Insert in the order of the key; return the number of new rows."""
        return self.run(
            "INSERT INTO {table} ({all}) SELECT {all} FROM {staging} "
            "WHERE NOT EXISTS (SELECT FROM pg_catalog.unnest(%s::int[]) AS but WHERE but = position) "
            "ORDER BY {key} ON CONFLICT ({key}) DO NOTHING RETURNING 1",
            list(positions),
        ).rowcount  # the number of rows returned by RETURNING, not a command tag

    def run(self, statement: LiteralString, *values: object, **names: sql.Composable) -> psycopg.Cursor[Any]:
        """Execute a statement about this table. Raises psycopg.Error."""
        return self.connection.execute(self.format(statement, **names), values)

    def format(self, statement: LiteralString, **names: sql.Composable) -> sql.Composed:
        """Return a statement with the names of the tables and columns."""
        return sql.SQL(statement).format(**self._names, **names)


_STORED: Final = (
    "CROSS JOIN LATERAL (SELECT * FROM {table} found WHERE found.{key} = staged.{key} AND ({in_range}) OFFSET 0) "
    "AS stored"
)
"""OFFSET 0 keeps the planner, which knows nothing of a fresh temporary table, from scanning the whole table: each
key is looked up in the index."""
_STORED_DISTRIBUTED: Final = (
    "JOIN (SELECT * FROM {table} found WHERE {in_range}) AS stored ON stored.{key} = staged.{key}"
)
"""Citus sends the staged rows to the workers, and cannot push down OFFSET."""
_STALE: Final = (
    "SELECT pg_catalog.to_regclass({staging_name}) IS NOT NULL AND EXISTS (SELECT FROM "
    "pg_catalog.pg_attribute AS now LEFT JOIN pg_catalog.pg_attribute AS before "
    "ON before.attname = now.attname "
    "AND before.attrelid = pg_catalog.to_regclass({staging_name})::pg_catalog.oid "
    "AND before.atttypid = now.atttypid AND before.atttypmod = now.atttypmod "
    "WHERE now.attrelid = pg_catalog.to_regclass({table_name})::pg_catalog.oid "
    "AND now.attname = ANY({all_columns}) AND before.attname IS NULL)"
)


class StagingWriter:
    """Sends rows with their positions, and records their keys."""

    def __init__(self, rows: RowWriter, keys: dict[int, str]) -> None:
        self._rows = rows
        self._keys = keys

    def write(self, row: Row) -> None:
        """Raises psycopg.Error."""
        position = len(self._keys)
        self._keys[position] = row.event_id
        self._rows.write(f"{position}\t{row.copy}")


def _differ(table: Table) -> sql.Composable:
    """Return the condition that two rows are not duplicates (tables.py), with the cheapest comparisons first."""

    def row(alias: str, details: LiteralString) -> sql.Composable:
        # varchar has no operators of its own
        columns = [
            sql.SQL("{}::text").format(sql.Identifier(alias, column))
            if column.endswith(("_name", "_type"))
            else sql.Identifier(alias, column)
            for column in table.payload
        ]
        detail = sql.SQL(details).format(sql.Identifier(alias, table.details), sql.Literal(list(FILLED_IN)))
        return sql.SQL("({})").format(sql.SQL(", ").join([*columns, detail]))

    whole, given = "{}", "{} - {}::text[]"
    return sql.SQL("{} IS DISTINCT FROM {} AND {} IS DISTINCT FROM {}").format(
        row("staged", whole), row("stored", whole), row("staged", given), row("stored", given)
    )
