"""Finds triggers, rules and policies, because they may silently discard rows."""

from __future__ import annotations

from typing import Final

from psycopg import sql

from loader.load.database import Connection
from loader.load.decode import Reject
from loader.load.tables import Table

NOT_STORED: Final = "not_stored"
"""Reject code of a line whose row was inserted without an error, but not stored."""

_FIND: Final = sql.SQL(
    "WITH relations AS (SELECT {table}::pg_catalog.regclass::pg_catalog.oid AS relation UNION "
    "SELECT relid FROM pg_catalog.pg_partition_tree({table}::pg_catalog.regclass)) "
    "SELECT pg_catalog.format('trigger %%s', pg_catalog.quote_ident(tgname)) "
    "FROM pg_catalog.pg_trigger JOIN relations ON tgrelid = relation "
    "WHERE NOT tgisinternal AND tgenabled <> 'D' AND (tgtype::pg_catalog.int4 & 4) = 4 "
    "UNION SELECT pg_catalog.format('rule %%s', pg_catalog.quote_ident(rulename)) "
    "FROM pg_catalog.pg_rewrite JOIN relations ON ev_class = relation "
    "WHERE ev_type = '3' AND ev_enabled <> 'D' "
    "UNION SELECT 'row-level security' FROM pg_catalog.pg_class "
    "JOIN relations ON oid = relation WHERE relrowsecurity "
    "ORDER BY 1"
)

_MAY_HAVE: Final = sql.SQL(
    "SELECT relhastriggers OR relhasrules OR relrowsecurity OR relkind = 'p' FROM pg_catalog.pg_class "
    "WHERE oid = {table}::pg_catalog.regclass::pg_catalog.oid"
)
"""A first check for each batch, which takes a tenth of the time of the full query."""


def triggers(connection: Connection, table: Table | str) -> list[str]:
    """Return the triggers, rules and policies that apply to inserted rows, by kind and name. Raises psycopg.Error.

    Call it after an INSERT, whose lock prevents new triggers until the COMMIT.
    """
    name = table if isinstance(table, str) else table.name
    if connection.execute(_MAY_HAVE.format(table=sql.Literal(name))).fetchone() != (True,):
        return []
    found = connection.execute(_FIND.format(table=sql.Literal(name)), ())
    return [cause for (cause,) in found]


def not_stored(table: Table, causes: list[str]) -> Reject:
    """Return the reject of a row that was not stored, with the possible causes."""
    cause = ", ".join(causes) or "no trigger, rule or policy is the cause"
    return Reject(NOT_STORED, f"{table.name} did not store the row and reported no error: see its {cause}")
