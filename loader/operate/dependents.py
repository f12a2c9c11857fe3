"""Objects that prevent a migration: schema.sql did not create them, and they would stay on the old table.

A view, a trigger or a publication belongs to a table, not to its name. After the migration the old table is only the
partition of the existing rows, so such an object would silently miss all later rows. The migration does not move
these objects, because only their owner knows how they should be defined on the new table.

Columns, defaults, checks, indexes, foreign keys, privileges, comments and the sequences of columns are copied to the
new table. A statistics object stays on the old table and is copied to the new one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from loader.errors import LoaderError
from loader.load import schema
from loader.load.database import Connection
from loader.load.sqlstate import MIGRATION_CHECKS
from loader.load.tables import EVENTS, METRICS, Table


@dataclass(frozen=True)
class Obstacle:
    """An object or a property of a table, and what to do about it."""

    table: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.table}: {self.what}: {self.remedy}"


class CannotMigrateError(LoaderError):
    """The tables have objects or properties that a migration would break."""

    def __init__(self, obstacles: Sequence[Obstacle]) -> None:
        objects = "1 object prevents" if len(obstacles) == 1 else f"{len(obstacles)} objects prevent"
        super().__init__(f"{objects} the migration: the tables are still plain")
        self.obstacles = obstacles


_AGAIN: Final = "drop it, and create it again after the migration"

_USERS: Final = """
    WITH old AS (
        SELECT c.oid, c.relname, c.relnamespace, c.reltype, t.typarray
        FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_type AS t ON t.oid = c.reltype
        WHERE c.oid = ANY (%(tables)s::oid[])
    ), dependent AS (
        SELECT DISTINCT old.*, d.classid, d.objid, view.oid AS view_id, view.relname AS view_name,
            view.relnamespace AS view_schema
        FROM old
        JOIN pg_catalog.pg_depend AS d ON d.refclassid = 'pg_catalog.pg_class'::regclass::oid AND d.refobjid = old.oid
            OR d.refclassid = 'pg_catalog.pg_type'::regclass::oid AND d.refobjid IN (old.reltype, old.typarray)
        LEFT JOIN pg_catalog.pg_rewrite AS r ON d.classid = 'pg_catalog.pg_rewrite'::regclass::oid AND r.oid = d.objid
        LEFT JOIN pg_catalog.pg_class AS view ON view.oid = r.ev_class AND view.oid <> old.oid
    )
    SELECT relname, CASE WHEN view_id IS NULL THEN pg_catalog.pg_describe_object(classid, objid, 0)
        ELSE pg_catalog.pg_describe_object('pg_catalog.pg_class'::regclass::oid, view_id, 0) END
    FROM dependent
    WHERE NOT CASE classid::regclass
        WHEN 'pg_catalog.pg_class'::regclass THEN EXISTS (
            SELECT FROM pg_catalog.pg_class AS c LEFT JOIN pg_catalog.pg_index AS i ON i.indexrelid = c.oid
            WHERE c.oid = objid AND (i.indrelid = dependent.oid OR c.relkind IN ('t', 'S')))
        WHEN 'pg_catalog.pg_constraint'::regclass THEN EXISTS (
            SELECT FROM pg_catalog.pg_constraint AS k WHERE k.oid = objid AND k.conrelid = dependent.oid
                AND NOT (k.contype = 'f' AND k.confrelid = dependent.oid))
        WHEN 'pg_catalog.pg_attrdef'::regclass THEN EXISTS (
            SELECT FROM pg_catalog.pg_attrdef AS a WHERE a.oid = objid AND a.adrelid = dependent.oid)
        WHEN 'pg_catalog.pg_type'::regclass THEN objid IN (reltype, typarray)
        WHEN 'pg_catalog.pg_statistic_ext'::regclass THEN true
        WHEN 'pg_catalog.pg_trigger'::regclass THEN true
        WHEN 'pg_catalog.pg_rewrite'::regclass THEN
            coalesce(view_schema = relnamespace AND view_name = ANY (%(ours)s::name[]), false)
        WHEN 'pg_catalog.pg_proc'::regclass THEN EXISTS (
            SELECT FROM pg_catalog.pg_proc AS p
            WHERE p.oid = objid AND p.pronamespace = relnamespace AND p.proname = ANY (%(ours)s::name[]))
        ELSE false END
    UNION
    SELECT relname, pg_catalog.pg_describe_object('pg_catalog.pg_trigger'::regclass::oid, t.oid, 0)
    FROM old JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = old.oid WHERE NOT t.tgisinternal
    ORDER BY 1, 2
"""
"""Everything that depends on the tables, except their own parts and what schema.sql creates."""

_PROPERTIES: Final = """
    WITH old AS (
        SELECT c.oid, c.relname, c.relnamespace, c.relrowsecurity, c.reloftype, keys.key
        FROM pg_catalog.pg_class AS c JOIN ROWS FROM (
            pg_catalog.unnest(%(names)s::text[]), pg_catalog.unnest(%(keys)s::text[])) AS keys (name, key)
            ON c.relname = keys.name::name
        WHERE c.oid = ANY (%(tables)s::oid[])
    )
    SELECT old.relname, 'publication ' || pg_catalog.quote_ident(p.pubname) || ' of all tables', %(again)s
    FROM old CROSS JOIN pg_catalog.pg_publication AS p WHERE p.puballtables
    UNION ALL
    SELECT old.relname, 'publication ' || pg_catalog.quote_ident(p.pubname) || ' of its schema', %(again)s
    FROM old JOIN pg_catalog.pg_publication_namespace AS n ON n.pnnspid = old.relnamespace
    JOIN pg_catalog.pg_publication AS p ON p.oid = n.pnpubid
    UNION ALL
    SELECT old.relname, 'row-level security', 'ALTER TABLE ... DISABLE ROW LEVEL SECURITY' FROM old WHERE relrowsecurity
    UNION ALL
    SELECT old.relname, 'it is a table of a type', 'ALTER TABLE ... NOT OF' FROM old WHERE reloftype <> 0
    UNION ALL
    SELECT old.relname, 'it inherits from ' || i.inhparent::regclass::text, 'ALTER TABLE ... NO INHERIT'
    FROM old JOIN pg_catalog.pg_inherits AS i ON i.inhrelid = old.oid
    UNION ALL
    SELECT old.relname, 'column ' || pg_catalog.quote_ident(a.attname) || ' is an identity',
        'ALTER COLUMN ... DROP IDENTITY'
    FROM old JOIN pg_catalog.pg_attribute AS a ON a.attrelid = old.oid
    WHERE a.attidentity <> '' AND NOT a.attisdropped
    UNION ALL
    SELECT old.relname, 'constraint ' || pg_catalog.quote_ident(k.conname) || ' is not valid',
        'ALTER TABLE ... VALIDATE CONSTRAINT, or drop it'
    FROM old JOIN pg_catalog.pg_constraint AS k ON k.conrelid = old.oid
    LEFT JOIN pg_catalog.pg_class AS parent ON parent.oid = k.confrelid
    LEFT JOIN pg_catalog.pg_namespace AS n ON n.oid = parent.relnamespace
    WHERE NOT k.convalidated AND k.conname <> ALL (%(until)s::name[])
        AND NOT coalesce(k.contype = 'f'
            AND (parent.relname = 'family_units' OR n.nspname = 'auth' AND parent.relname = 'users'), false)
    UNION ALL
    SELECT old.relname, 'constraint ' || pg_catalog.quote_ident(k.conname) || ' cannot be that of partitions', %(drop)s
    FROM old JOIN pg_catalog.pg_constraint AS k ON k.conrelid = old.oid
    WHERE k.contype = 'x' OR k.contype = 'c' AND k.connoinherit
    UNION ALL
    SELECT old.relname, 'unique index ' || index.relname || ' has no column ' || pg_catalog.quote_ident(key), %(drop)s
    FROM old JOIN pg_catalog.pg_index AS i ON i.indrelid = old.oid
    JOIN pg_catalog.pg_class AS index ON index.oid = i.indexrelid
    WHERE i.indisunique AND NOT i.indisprimary AND i.indisvalid AND NOT (i.indexprs IS NULL AND EXISTS (
        SELECT FROM pg_catalog.pg_attribute AS a
        WHERE a.attrelid = old.oid AND a.attname = key::name AND a.attnum = ANY (i.indkey)))
    UNION ALL
    SELECT old.relname, 'the name of the table ' || taken.oid::regclass::text || ' is needed', 'rename or drop it'
    FROM old JOIN pg_catalog.pg_class AS taken ON taken.relnamespace = old.relnamespace
        AND taken.relname IN (old.relname || '_plain', old.relname || '_partitioned', old.relname || '_other',
            old.relname || '_default')
    WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_class AS frame
        WHERE frame.relnamespace = old.relnamespace AND frame.relname = old.relname || '_partitioned'
            AND frame.relkind = 'p'
            AND (frame.oid = taken.oid OR EXISTS (
                SELECT FROM pg_catalog.pg_inherits AS i WHERE i.inhrelid = taken.oid AND i.inhparent = frame.oid)))
    ORDER BY 1, 2
"""
"""Features that a partitioned table or a partition cannot have."""


def find(connection: Connection, tables: Sequence[int]) -> list[Obstacle]:
    """Return what would be lost or refused if the tables with these oids became partitions. Raises psycopg.Error."""
    kinds: tuple[Table, ...] = (EVENTS, METRICS)
    values = {
        "tables": list(tables), "names": [kind.name for kind in kinds], "keys": [kind.key for kind in kinds],
        "again": _AGAIN, "drop": "drop it", "until": list(MIGRATION_CHECKS),
    }  # fmt: skip
    found = connection.execute(_PROPERTIES, values).fetchall()
    return users(connection, tables, schema.created_names()) + [Obstacle(*row) for row in found]


def users(connection: Connection, tables: Sequence[int], ours: Collection[str] = ()) -> list[Obstacle]:
    """Return the views, functions and other objects that use the tables, except those named in `ours`."""
    found = connection.execute(_USERS, {"tables": list(tables), "ours": list(ours)}).fetchall()
    return [Obstacle(table, what, _AGAIN) for table, what in found]


def ours(connection: Connection, tables: Sequence[int]) -> tuple[list[str], list[str]]:
    """Return the names of the views and functions of schema.sql that use the tables. Raises psycopg.Error."""
    found = connection.execute(
        _OURS, {"tables": list(tables), "ours": list(schema.created_names())}
    ).fetchall()
    views, functions = ([name for name, is_view in found if is_view is kind] for kind in (True, False))
    return views, functions


_OURS: Final = """
    SELECT DISTINCT coalesce(view.relname, p.proname)::text, view.oid IS NOT NULL
    FROM pg_catalog.pg_depend AS d
    LEFT JOIN pg_catalog.pg_rewrite AS r ON d.classid = 'pg_catalog.pg_rewrite'::regclass::oid AND r.oid = d.objid
    LEFT JOIN pg_catalog.pg_class AS view ON view.oid = r.ev_class
    LEFT JOIN pg_catalog.pg_proc AS p ON d.classid = 'pg_catalog.pg_proc'::regclass::oid AND p.oid = d.objid
    WHERE d.refclassid = 'pg_catalog.pg_class'::regclass::oid AND d.refobjid = ANY (%(tables)s::oid[])
        AND coalesce(view.relname, p.proname) = ANY (%(ours)s::name[])
    ORDER BY 1
"""
