"""COPY row by row, and the lookup of keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import sql

from loader.load.database import Connection, is_distributed
from loader.load.partitions import key_ranges
from loader.load.tables import Table

_BLOCK_ROWS: Final = 256
"""Rows sent in one write, about 64 KiB: a psycopg write per row would take a microsecond more per row."""


class RowWriter:
    """Sends rows in COPY's text format, in blocks."""

    def __init__(self, copy: psycopg.Copy) -> None:
        self._copy = copy
        self._block: list[str] = []

    def write(self, row: str) -> None:
        """Send a row (without its newline) now or together with later ones. Raises psycopg.Error."""
        block = self._block
        block.append(row)
        if len(block) == _BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        """Send the buffered rows. Raises psycopg.Error."""
        if self._block:
            self._block.append("")
            self._copy.write("\n".join(self._block))
            self._block.clear()


@contextmanager
def copying(connection: Connection, table: sql.Identifier, columns: Iterable[str]) -> Iterator[RowWriter]:
    """Open a COPY into the columns of a table. Raises psycopg.Error for the first row that is refused."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        table, sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor().copy(statement) as copy:
        writer = RowWriter(copy)
        yield writer
        writer.flush()


def copy(connection: Connection, table: Table, rows: Iterable[str]) -> None:
    """Copy rows into a table. Raises psycopg.Error for the first that is refused."""
    with copying(connection, sql.Identifier(table.name), table.columns) as writer:
        for row in rows:
            writer.write(row)


_EXISTING: Final = (
    "SELECT found.key::text FROM pg_catalog.unnest(%s::uuid[]) AS wanted CROSS JOIN LATERAL "
    "(SELECT {key} AS key FROM {table} WHERE {key} = wanted AND ({in_range}) OFFSET 0) AS found"
)
_EXISTING_DISTRIBUTED: Final = (
    "SELECT {key}::text FROM {table} WHERE {key} = ANY(%s::uuid[]) AND ({in_range})"
)
"""Citus cannot push down OFFSET."""


def existing_ids(connection: Connection, table: Table, ids: Sequence[str]) -> set[str]:
    """Return the canonical UUIDs that are the key of an existing row. Raises psycopg.Error."""
    if not ids:
        return set()
    statement = sql.SQL(_EXISTING_DISTRIBUTED if is_distributed(connection) else _EXISTING).format(
        key=sql.Identifier(table.key), table=sql.Identifier(table.name), in_range=in_range(table, ids)
    )  # fmt: skip
    return {key for (key,) in connection.execute(statement, ["{" + ",".join(ids) + "}"])}


def any_missing(connection: Connection, table: Table, ids: Sequence[str]) -> bool:
    """Return whether any of the canonical UUIDs is not the key of an existing row. Raises psycopg.Error."""
    return len(existing_ids(connection, table, ids)) < len(set(ids))


def in_range(table: Table, ids: Iterable[str], alias: str | None = None) -> sql.Composable:
    """Return the condition that a key is within the ranges of some ids: see `key_ranges`."""
    key = sql.Identifier(alias, table.key) if alias else sql.Identifier(table.key)
    return sql.SQL(" OR ").join(
        sql.SQL("{} BETWEEN {}::uuid AND {}::uuid").format(key, sql.Literal(low), sql.Literal(high))
        for low, high in key_ranges(ids)
    )
