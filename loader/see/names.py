"""Qualifies names in the statements of `ask`, `report` and `export`, so that no other object can match.

The search path has only the system's schema, and each of our names is qualified with the schema of the
tables. So a function or operator of another schema is never a better match, whatever the settings of the role
or database.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from psycopg import sql

from loader.load.database import Connection, search_path

_OURS: Final = re.compile(r"\banalytics_\w+")
_HOME: Final = (
    "SELECT nspname FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace ON pg_namespace.oid "
    "OPERATOR(pg_catalog.=) relnamespace "
    "WHERE pg_class.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass('analytics_events')::oid"
)
_homes: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()
"""The schema of the tables, by connection; missing if there are no tables."""


def pin(connection: Connection) -> None:
    """Set the settings that the transaction depends on, and pin its search path. Call it first. Raises psycopg.Error.

    The settings are those of a load (loader.load.database), except that the reader's statement_timeout is
    kept.
    """
    ((timeout,),) = connection.execute("SELECT pg_catalog.current_setting('statement_timeout')").fetchall()
    path = sql.SQL(search_path(connection))
    connection.execute(sql.SQL("SET LOCAL search_path = {}").format(path))
    for (home,) in connection.execute(_HOME):
        _homes[connection] = home
    # psycopg parses intervals, such as the time to convert, only in this style.
    connection.execute("SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL IntervalStyle = 'postgres'")
    connection.execute("SELECT pg_catalog.set_config('statement_timeout', %s, true)", [timeout])


def table(connection: Connection, name: str) -> sql.Identifier:
    """Return one of our names, qualified with its schema."""
    home = _homes.get(connection)
    return sql.Identifier(name) if home is None else sql.Identifier(home, name)


def fetch(
    connection: Connection, statement: str, values: Mapping[str, Any] | Sequence[Any] | None = None
) -> list[tuple[Any, ...]]:
    """Run a statement with our names qualified, on a pinned connection. Raises psycopg.Error."""

    def qualify(found: re.Match[str]) -> str:
        name = table(connection, found[0]).as_string(connection)
        return name if values is None else name.replace("%", "%%")

    return connection.execute(_OURS.sub(qualify, statement).encode(), values).fetchall()
