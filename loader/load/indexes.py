"""Builds the indexes for the questions on tables with rows, concurrently with loading.

`CREATE INDEX CONCURRENTLY` cannot run in a transaction, so it is not part of schema.sql; the list of indexes
is (`analytics_indexes`). A partitioned table gets an index by attaching those of its partitions
(https://www.postgresql.org/docs/current/sql-createindex.html, "CONCURRENTLY").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from loader.load.database import Connection, transaction

_WANTED: Final = (
    "SELECT name, definition, schema::pg_catalog.text, replaced.relname, coalesce(found.indisvalid, false), "
    "found.indisvalid IS FALSE, "
    "EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind = 'p' AND relnamespace = schema::pg_catalog.oid "
    "AND relname = pg_catalog.substring(definition, 'analytics_(?:events|metrics)')) "
    "FROM analytics_indexes() AS wanted "
    "LEFT JOIN pg_catalog.pg_class AS existing ON existing.relname = name "
    "AND existing.relnamespace = schema::pg_catalog.oid "
    "LEFT JOIN pg_catalog.pg_index AS found ON found.indexrelid = existing.oid "
    "LEFT JOIN pg_catalog.pg_class AS replaced ON replaced.relname = replaces "
    "AND replaced.relnamespace = schema::pg_catalog.oid"
)
_PARTITIONS_WITHOUT: Final = """
    SELECT nspname, relname FROM pg_catalog.pg_inherits AS own
    JOIN pg_catalog.pg_class ON pg_class.oid = own.inhrelid
    JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
    WHERE own.inhparent = (SELECT indrelid FROM pg_catalog.pg_index WHERE indexrelid = %(index)s::regclass::oid)
        AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_inherits AS attached
            JOIN pg_catalog.pg_index ON indexrelid = attached.inhrelid AND indrelid = own.inhrelid
            WHERE attached.inhparent = %(index)s::regclass::oid)
    ORDER BY relname
"""


# This never blocks a load. The limits are reset, because a pooler may pass the session on to other clients.
_WITHOUT_LIMITS: Final = "SET statement_timeout = 0; SET lock_timeout = 0"
_RESET_LIMITS: Final = "RESET statement_timeout; RESET lock_timeout"


@dataclass(frozen=True)
class _Index:
    """A required index, the quoted schema of the tables, and the index that it replaces."""

    name: str
    definition: str
    schema: str
    replaced: str | None
    valid: bool
    invalid: bool
    of_partitioned: bool


def build(connection: Connection) -> list[str]:
    """Build missing indexes, drop those they replace, and return the names of the new ones.

    The connection must not be in a transaction; it is switched to autocommit mode temporarily. An index that
    an earlier attempt left invalid is rebuilt. Raises psycopg.Error.
    """
    with transaction(connection):
        wanted = [_Index(*row) for row in connection.execute(_WANTED).fetchall()]
    if all(index.valid and index.replaced is None for index in wanted):
        return []
    with in_no_transaction(connection):
        return [index.name for index in wanted if _build(connection, index)]


@contextmanager
def in_no_transaction(connection: Connection) -> Iterator[None]:
    """Have each statement of a block committed by itself, with no limit of time. Raises psycopg.Error."""
    before = connection.autocommit
    connection.autocommit = True
    try:
        connection.execute(_WITHOUT_LIMITS)
        yield
        connection.execute(_RESET_LIMITS)
    finally:
        if not connection.closed and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            connection.autocommit = before


def _build(connection: Connection, index: _Index) -> bool:
    if index.of_partitioned:
        if not index.valid:
            _build_on_partitions(connection, index)
        return not index.valid
    if index.invalid:
        _drop(connection, index.schema, index.name)
    if not index.valid:
        connection.execute(f"CREATE INDEX CONCURRENTLY {index.name} ON {index.definition}".encode())
    if index.replaced is not None:
        _drop(connection, index.schema, index.replaced)
    return not index.valid


def _build_on_partitions(connection: Connection, index: _Index) -> None:
    """Build the index on each partition and attach it; the parent index is valid once all partitions have theirs."""
    table, columns = index.definition.split(" ", 1)
    whole = f"{index.schema}.{index.name}"
    if not index.invalid:
        connection.execute(f"CREATE INDEX {index.name} ON ONLY {index.definition}".encode())
    for schema, partition in connection.execute(_PARTITIONS_WITHOUT, {"index": whole}).fetchall():
        name = index.name.replace(table.rpartition(".")[2], partition)
        own = sql.Identifier(schema, name)
        connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(own))
        connection.execute(
            sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} {}").format(
                sql.Identifier(name), sql.Identifier(schema, partition), _trusted(columns)
            )
        )
        connection.execute(sql.SQL("ALTER INDEX {} ATTACH PARTITION {}").format(_trusted(whole), own))


def _trusted(text: str) -> sql.SQL:
    """Return SQL generated by `analytics_indexes`."""
    return sql.SQL(text)


def _drop(connection: Connection, schema: str, name: str) -> None:
    connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {schema}.{name}".encode())
