"""The tables: creates or upgrades them (schema.sql, role.sql, reader.sql) and reads their version."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from loader.load.database import Connection

SCHEMA_VERSION: Final = 3
"""The version that schema.sql creates. This loader can load into the tables of every earlier version."""


def apply_schema(
    connection: Connection, *, foreign_keys: bool = True, role: str | None = None, reader: str | None = None
) -> None:
    """Apply schema.sql in one transaction, role.sql for a role, reader.sql for a reader. Idempotent.

    Tables with rows get no new indexes here: see indexes.py. Raises psycopg.Error.
    """
    with connection.transaction():
        _set(connection, "analytics.foreign_keys", "on" if foreign_keys else "off")
        _set(connection, "analytics.indexes", "later")
        connection.execute(_script("schema.sql"))
        if role is not None:
            _set(connection, "analytics.role", role)
            connection.execute(_script("role.sql"))
        if reader is not None:
            _set(connection, "analytics.reader", reader)
            connection.execute(_script("reader.sql"))


def schema_version(connection: Connection) -> int:
    """Return the version of the tables, 0 if there are none. Raises psycopg.Error."""
    found = "SELECT to_regclass('analytics_schema'), to_regclass('analytics_loads')"
    ((versions, ledger),) = connection.execute(found).fetchall()
    if versions is None:
        return 0 if ledger is None else 1
    ((version,),) = connection.execute("SELECT coalesce(max(version), 1) FROM analytics_schema").fetchall()
    return int(version)


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute("SELECT set_config(%s, %s, true)", [name, value])


def _script(name: str) -> bytes:
    return files("loader").joinpath(name).read_bytes()
