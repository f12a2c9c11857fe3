"""The indexes that serve the questions, built beside the load on tables that have rows.

`CREATE INDEX CONCURRENTLY` cannot run in a transaction, so it is no part of schema.sql; what to build is in there
(`analytics_indexes`).
"""

from __future__ import annotations

from typing import Final

import psycopg
from psycopg import sql

from loader.load.database import Connection

_WANTED: Final = (
    "SELECT name, definition, replaces, coalesce(found.indisvalid, false), found.indisvalid IS FALSE, "
    "to_regclass(replaces) IS NOT NULL FROM analytics_indexes() "
    "LEFT JOIN pg_index AS found ON found.indexrelid = to_regclass(name)"
)


def build(connection: Connection) -> list[str]:
    """Build the indexes that are missing, drop those they replace, and return the names of those built.

    The connection must be in no transaction; it is in autocommit mode meanwhile. An index that an earlier attempt
    left invalid is built again. Raises psycopg.Error.
    """
    before = connection.autocommit
    connection.autocommit = True
    try:
        return [
            name
            for name, definition, replaces, valid, invalid, replaced in connection.execute(_WANTED).fetchall()
            if _build(
                connection, name, definition, replaces if replaced else None, valid=valid, invalid=invalid
            )
        ]
    finally:
        if not connection.closed and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            connection.autocommit = before


def _build(
    connection: Connection, name: str, definition: str, replaces: str | None, *, valid: bool, invalid: bool
) -> bool:
    if invalid:
        _drop(connection, name)
    if not valid:
        create = sql.SQL("CREATE INDEX CONCURRENTLY {} ON ").format(sql.Identifier(name))
        connection.execute(create.as_bytes(connection) + definition.encode())
    if replaces is not None:
        _drop(connection, replaces)
    return not valid


def _drop(connection: Connection, name: str) -> None:
    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
