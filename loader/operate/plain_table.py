"""The properties of a plain table that its partitioned replacement receives, and the names of both (migrate.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from loader.load.database import Connection
from loader.load.tables import Table


@dataclass(frozen=True)
class Index:
    """An index of a plain table; `definition` begins after USING."""

    name: str
    valid: bool
    primary: bool
    unique: bool
    columns: tuple[str, ...]
    """The key columns; empty for an index on expressions and for a partial index."""
    constraint: str | None
    definition: str
    comment: str | None


@dataclass(frozen=True)
class Shape:
    """The properties that the partitioned table takes from the plain one."""

    columns: tuple[tuple[Any, ...], ...]
    constraints: tuple[tuple[Any, ...], ...]
    indexes: tuple[Index, ...]

    def valid_keys(self) -> list[tuple[str, str]]:
        """Return name and definition of the validated foreign keys."""
        return [(name, words) for name, kind, valid, words in self.constraints if kind == "f" and valid]

    def written(self) -> list[str]:
        """Return the columns that an INSERT can set."""
        return [name for name, _, _, generated, _ in self.columns if not generated]

    def kept(self, table: Table) -> list[Index]:
        """Return the indexes to create on the partitioned table, besides the primary key."""
        return [
            index
            for index in self.indexes
            if index.valid and not self._is_replaced(index, table) and index.name != key_name(table)
        ]

    def replaced(self, table: Table) -> list[Index]:
        """Return the indexes that the new primary key replaces."""
        return [
            each for each in self.indexes if self._is_replaced(each, table) and each.name != key_name(table)
        ]

    def _is_replaced(self, index: Index, table: Table) -> bool:
        return index.unique and index.columns in ((table.key,), ("id",))


def key_name(table: Table) -> str:
    return f"{table.name}_plain_pkey"


def until(table: Table) -> str:
    return f"{table.name}_until"


def frame(table: Table) -> str:
    return f"{table.name}_partitioned"


def plain(table: Table) -> str:
    return f"{table.name}_plain"


def frame_index(table: Table, number: int) -> str:
    return f"{frame(table)}_{number}"


_LONGEST_NAME: Final = 63
"""Maximum length of an identifier in bytes (NAMEDATALEN - 1)."""


def plain_index(table: Table, name: str, number: int) -> str:
    wanted = name.replace(table.name, plain(table), 1) if table.name in name else f"{name}_plain"
    return wanted if len(wanted.encode()) <= _LONGEST_NAME else f"{plain(table)}_{number}"


def _after_using(definition: str, quoted_name: str) -> str:
    """Return the method and columns from the output of pg_get_indexdef, whose keywords are in upper case."""
    return definition.split(quoted_name, 1)[1].split(" USING ", 1)[1]


def shape(connection: Connection, table: str) -> Shape:
    """Return the properties of a table. Its name must be quoted as in SQL. Raises psycopg.Error."""
    columns, constraints, found = (
        connection.execute(statement.encode(), [table]).fetchall()
        for statement in (_COLUMNS, _CONSTRAINTS, _INDEXES)
    )
    kinds = (
        Index(
            name,
            valid,
            primary,
            unique,
            tuple(compared),
            constraint,
            _after_using(definition, quoted),
            comment,
        )
        for name, valid, primary, unique, compared, constraint, definition, quoted, comment in found
    )
    return Shape(tuple(columns), tuple(constraints), tuple(kinds))


_COLUMNS: Final = """
    SELECT attname, pg_catalog.format_type(atttypid, atttypmod), attnotnull, attgenerated <> '',
        pg_catalog.pg_get_expr(adbin, adrelid)
    FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid = %s::regclass::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_CONSTRAINTS: Final = r"""
    SELECT conname, contype::text, convalidated, pg_catalog.pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid = %s::regclass::oid AND contype IN ('c', 'f')
        AND conname NOT LIKE 'analytics\_%%\_until' ORDER BY conname
"""
_INDEXES: Final = """
    SELECT c.relname, i.indisvalid, i.indisprimary, i.indisunique,
        CASE WHEN i.indexprs IS NULL AND i.indpred IS NULL
            THEN ARRAY(SELECT a.attname::text
                FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS part (number, place)
                JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = part.number
                WHERE part.place <= i.indnkeyatts ORDER BY part.place)
            ELSE ARRAY[]::text[] END,
        (SELECT k.conname FROM pg_constraint AS k
            WHERE k.conindid = c.oid AND k.conrelid = i.indrelid AND k.contype IN ('p', 'u')),
        pg_catalog.pg_get_indexdef(c.oid), pg_catalog.quote_ident(c.relname),
        pg_catalog.obj_description(c.oid, 'pg_class')
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE i.indrelid = %s::regclass::oid ORDER BY c.relname
"""
