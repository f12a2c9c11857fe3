"""Builds the indexes for the questions on tables with rows, concurrently with loading.

`CREATE INDEX CONCURRENTLY` cannot run in a transaction, so it is not part of schema.sql; the list of indexes
is (`analytics_indexes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import psycopg

from loader.load.database import Connection, transaction

_WANTED: Final = (
    "SELECT name, definition, schema::pg_catalog.text, replaced.relname, coalesce(found.indisvalid, false), "
    "found.indisvalid IS FALSE FROM analytics_indexes() AS wanted "
    "LEFT JOIN pg_catalog.pg_class AS existing ON existing.relname = name "
    "AND existing.relnamespace = schema::pg_catalog.oid "
    "LEFT JOIN pg_catalog.pg_index AS found ON found.indexrelid = existing.oid "
    "LEFT JOIN pg_catalog.pg_class AS replaced ON replaced.relname = replaces "
    "AND replaced.relnamespace = schema::pg_catalog.oid"
)


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


def build(connection: Connection) -> list[str]:
    """Build missing indexes, drop those they replace, and return the names of the new ones.

    The connection must not be in a transaction; it is switched to autocommit mode temporarily. An index that
    an earlier attempt left invalid is rebuilt. Raises psycopg.Error.
    """
    with transaction(connection):
        wanted = [_Index(*row) for row in connection.execute(_WANTED).fetchall()]
    if all(index.valid and index.replaced is None for index in wanted):
        return []
    before = connection.autocommit
    connection.autocommit = True
    try:
        connection.execute(_WITHOUT_LIMITS)
        built = [index.name for index in wanted if _build(connection, index)]
        connection.execute(_RESET_LIMITS)
        return built
    finally:
        if not connection.closed and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            connection.autocommit = before


def _build(connection: Connection, index: _Index) -> bool:
    if index.invalid:
        _drop(connection, index.schema, index.name)
    if not index.valid:
        connection.execute(f"CREATE INDEX CONCURRENTLY {index.name} ON {index.definition}".encode())
    if index.replaced is not None:
        _drop(connection, index.schema, index.replaced)
    return not index.valid


def _drop(connection: Connection, schema: str, name: str) -> None:
    connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {schema}.{name}".encode())
