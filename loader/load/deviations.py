"""Finds differences between existing tables and schema.sql, with a statement that corrects each.

An ORM may have created the tables, and people modify them. Checked is what a load relies on: the
types of the columns (another type rounds values or cannot be compared), one unique index on the key (a
duplicate is otherwise an error or a second row), and that nothing else refuses, changes or loses rows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from psycopg.rows import namedtuple_row

from loader.errors import LoaderError
from loader.load.database import Connection


class Severity(IntEnum):
    """The consequence of a deviation."""

    RISK = 1
    """Some rows may be refused or lost."""
    BLOCKED = 2
    """Rows are refused until it is corrected; none is lost or wrong."""
    REFUSED = 3
    """Rows would be wrong or stored twice, or none can be loaded: `loader init` refuses the tables."""


@dataclass(frozen=True)
class Deviation:
    """A difference of a table, and the SQL that corrects it."""

    table: str
    severity: Severity
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f'"{self.table}" {self.problem}: {self.remedy}'


_COLUMNS: Final[Mapping[str, Mapping[str, str]]] = {
    "analytics_events": {
        "id": "uuid", "event_id": "uuid", "event_type": "varchar(100)", "timestamp": "timestamptz",
        "user_id": "uuid", "family_unit_id": "uuid", "session_id": "uuid", "metadata": "jsonb",
    },
    "analytics_metrics": {
        "id": "uuid", "metric_name": "varchar(100)", "metric_type": "varchar(50)", "value": "numeric",
        "labels": "jsonb", "timestamp": "timestamptz",
    },
    "analytics_loads": {
        "digest": "bytea", "file": "text", "byte_offset": "bigint", "bytes": "bigint", "lines": "bigint",
        "events": "bigint", "metrics": "bigint", "duplicates": "bigint", "rejected": "bigint",
        "loader_host": "text",
    },
}  # fmt: skip
"""Columns written by a load, with their types in schema.sql."""
_KEYS: Final = {"analytics_events": "event_id", "analytics_metrics": "id", "analytics_loads": "digest"}
_DEFAULTS: Final = {"id": "gen_random_uuid()", "metadata": "'{}'", "labels": "'{}'"}
_OPTIONAL: Final = frozenset({"session_id", "labels"})
_TYPES: Final = {
    "uuid": r"uuid", "jsonb": r"jsonb", "numeric": r"numeric", "bytea": r"bytea", "bigint": r"bigint",
    "text": r"text|character varying",
    "timestamptz": r"timestamp(\(6\))? with time zone",
    "varchar(100)": r"text|character varying(\(\d+\))?", "varchar(50)": r"text|character varying(\(\d+\))?",
}  # fmt: skip
"""Types, as written by format_type(), that store every value unchanged; the width is checked separately."""
_TEXTUAL: Final = re.compile(
    r"text|character|character varying|character\(\d+\)|character varying\(\d+\)|json|jsonb"
)

# All names are in pg_catalog, in which other users cannot create operators or functions.
_RELATIONS_SQL: Final = """
    SELECT c.oid::bigint AS oid, c.relname AS name, c.oid::pg_catalog.regclass::text AS shown,
        c.relkind AS kind,
        c.relpersistence AS persistence, c.relrowsecurity AS has_row_security,
        pg_catalog.row_security_active(c.oid) AS has_active_row_security,
        pg_catalog.pg_has_role(c.relowner, 'USAGE') AS is_owned,
        coalesce(c.reloptions::text, '') AS options
    FROM pg_catalog.unnest(%s::text[]) AS wanted
    JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(wanted)::oid
"""
_COLUMNS_SQL: Final = """
    WITH RECURSIVE typed AS (
        SELECT a.attrelid, a.attnum, a.attname, a.atttypid AS type, a.atttypmod AS modifier,
            a.attnotnull, a.attnotnull AS required,
            a.attgenerated AS generated,
            a.atthasdef OR a.attidentity OPERATOR(pg_catalog.<>) '' AS has_default,
            pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared
        FROM pg_catalog.pg_attribute a
        WHERE a.attrelid OPERATOR(pg_catalog.=) ANY (%s::oid[]) AND a.attnum OPERATOR(pg_catalog.>) 0
            AND NOT a.attisdropped
        UNION ALL
        SELECT attrelid, attnum, attname, t.typbasetype, t.typtypmod, attnotnull, required OR t.typnotnull,
            generated, has_default OR t.typdefault IS NOT NULL, declared
        FROM typed JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) typed.type
        WHERE t.typtype OPERATOR(pg_catalog.=) 'd'
    )
    SELECT attrelid::bigint AS relation, attname AS name, pg_catalog.format_type(type, modifier) AS base,
        declared, attnotnull AS is_required_itself, required, generated, has_default,
        ARRAY(SELECT DISTINCT r.ev_class::pg_catalog.regclass::text
            FROM pg_catalog.pg_depend d JOIN pg_catalog.pg_rewrite r ON r.oid OPERATOR(pg_catalog.=) d.objid
            WHERE d.refobjid OPERATOR(pg_catalog.=) attrelid
                AND d.refobjsubid OPERATOR(pg_catalog.=) attnum::int
                AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass::oid
                AND r.ev_class OPERATOR(pg_catalog.<>) attrelid) AS views,
        ARRAY(WITH RECURSIVE used AS (
            SELECT d.objid FROM pg_catalog.pg_depend d
            WHERE d.refobjid OPERATOR(pg_catalog.=) attrelid
                AND d.refobjsubid OPERATOR(pg_catalog.=) attnum::int
                AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::oid
            UNION
            SELECT d.objid FROM used JOIN pg_catalog.pg_depend d ON d.refobjid OPERATOR(pg_catalog.=) used.objid
            WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::oid
                AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass::oid
        ) SELECT objid::pg_catalog.regproc::text FROM used ORDER BY 1) AS functions
    FROM typed JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) typed.type
    WHERE t.typtype OPERATOR(pg_catalog.<>) 'd'
    ORDER BY attrelid, attnum
"""
_INDEXES_SQL: Final = """
    SELECT i.indrelid::bigint AS relation, i.indexrelid::pg_catalog.regclass::text AS name,
        i.indisvalid AS is_valid, i.indimmediate AS is_immediate, i.indisprimary AS is_primary,
        i.indpred IS NULL AND i.indexprs IS NULL AS is_plain,
        ARRAY(SELECT pg_catalog.pg_get_indexdef(i.indexrelid, place, false)
            FROM pg_catalog.generate_series(1, i.indnkeyatts::int) AS place) AS columns,
        (SELECT k.conname FROM pg_catalog.pg_constraint k WHERE k.conindid OPERATOR(pg_catalog.=) i.indexrelid
            AND k.contype::text OPERATOR(pg_catalog.=) ANY (ARRAY['u', 'p']) LIMIT 1) AS constraint_name
    FROM pg_catalog.pg_index i
    WHERE i.indisunique AND i.indrelid OPERATOR(pg_catalog.=) ANY (%s::oid[])
"""
_HOOKS_SQL: Final = """
    SELECT tgrelid::bigint AS relation, 'trigger' AS kind, tgname AS name, false AS blocks
    FROM pg_catalog.pg_trigger
    WHERE tgrelid OPERATOR(pg_catalog.=) ANY (%s::oid[]) AND NOT tgisinternal
        AND tgenabled OPERATOR(pg_catalog.<>) 'D'
        AND (tgtype::int OPERATOR(pg_catalog.&) 4) OPERATOR(pg_catalog.<>) 0
    UNION ALL
    SELECT ev_class::bigint, 'rule', rulename, true
    FROM pg_catalog.pg_rewrite
    WHERE ev_class OPERATOR(pg_catalog.=) ANY (%s::oid[]) AND ev_enabled OPERATOR(pg_catalog.<>) 'D'
        AND ev_type::text OPERATOR(pg_catalog.=) ANY (ARRAY['2', '3'])
    ORDER BY 1, 2, 3
"""
"""Triggers on INSERT, and rules on UPDATE and INSERT: a table with one allows no ON CONFLICT."""


def find(connection: Connection) -> list[Deviation]:
    """Return the deviations of existing tables, the most severe first. Raises psycopg.Error."""
    relations = _rows(connection, _RELATIONS_SQL, list(_COLUMNS))
    ids = [relation.oid for relation in relations]
    columns, indexes, hooks = (
        _by_relation(_rows(connection, statement, *[ids] * statement.count("%s")))
        for statement in (_COLUMNS_SQL, _INDEXES_SQL, _HOOKS_SQL)
    )
    found = [
        deviation
        for relation in relations
        for deviation in _deviations(
            relation, columns[relation.oid], indexes[relation.oid], hooks[relation.oid]
        )
    ]
    return sorted(found, key=lambda deviation: -deviation.severity)


def refuse(deviations: Sequence[Deviation]) -> None:
    """Raise LoaderError, with the correcting statements, if a load would store wrong rows or none."""
    refused = [str(each) for each in deviations if each.severity is Severity.REFUSED]
    if refused:
        raise LoaderError(f"cannot load into these tables, nothing was changed: {' '.join(refused)}")


def _deviations(
    relation: Any, columns: Sequence[Any], indexes: Sequence[Any], hooks: Sequence[Any]
) -> Iterator[Deviation]:
    if relation.kind not in ("r", "p"):
        yield _moved_away(relation, "is not a table")
        return
    yield from _columns(relation, {column.name: column for column in columns})
    yield from _uniqueness(relation, indexes)
    yield from _row_security(relation)
    for hook in hooks:
        yield _hook(relation, hook)
    if relation.persistence == "u":
        yield Deviation(
            relation.name, Severity.RISK, "is unlogged, so a crash of the server empties it",
            f"ALTER TABLE {relation.shown} SET LOGGED;",
        )  # fmt: skip
    if re.search(r"autovacuum_enabled=(false|off|no|0)\b", relation.options):
        yield Deviation(
            relation.name, Severity.RISK, "is not vacuumed, so it grows and scans become slow",
            f"ALTER TABLE {relation.shown} RESET (autovacuum_enabled);",
        )  # fmt: skip


def _columns(relation: Any, columns: Mapping[str, Any]) -> Iterator[Deviation]:
    expected = _COLUMNS[relation.name]
    alter = f"ALTER TABLE {relation.shown}"
    for name, kind in expected.items():
        if name not in columns:
            yield Deviation(
                relation.name,
                Severity.REFUSED,
                f'lacks the column "{name}"',
                f"{alter} ADD COLUMN {name} {kind};",
            )
        else:
            yield from _loaded_column(relation, columns[name], kind)
    for column in columns.values():
        if column.name not in expected and column.required and not column.has_default:
            yield Deviation(
                relation.name, Severity.BLOCKED,
                f'has the column "{column.name}", which is NOT NULL, has no default and is not loaded, '
                "so every row is rejected",
                f"{alter} ALTER COLUMN {_quoted(column.name)} DROP NOT NULL;" if column.is_required_itself
                else f"ALTER DOMAIN {column.declared} DROP NOT NULL;",
            )  # fmt: skip


def _loaded_column(relation: Any, column: Any, kind: str) -> Iterator[Deviation]:
    alter = f"ALTER TABLE {relation.shown}"
    if not re.fullmatch(_TYPES[kind], column.base):
        problem = f'has the column "{column.name}" of the type {column.declared}, not {kind}'
        if (change := _type_change(column, kind)) is None:
            yield _moved_away(relation, problem)
        else:
            yield Deviation(
                relation.name, Severity.REFUSED, problem, f"{_drop_readers(column)}{alter} {change};"
            )
        return
    if column.generated:
        # A virtual column (PostgreSQL 18) has no stored values to keep.
        change = (
            f"ALTER COLUMN {column.name} DROP EXPRESSION" if column.generated == "s"
            else f"DROP COLUMN {column.name}, ADD COLUMN {column.name} {kind}"
        )  # fmt: skip
        yield Deviation(
            relation.name, Severity.REFUSED, f'computes the column "{column.name}", which is loaded',
            f"{alter} {change};",
        )  # fmt: skip
    elif _width(column.base) < _width(kind):
        yield Deviation(
            relation.name, Severity.RISK,
            f'has the column "{column.name}" of the type {column.declared}, so longer names are rejected',
            f"{_drop_readers(column)}{alter} ALTER COLUMN {column.name} TYPE {kind};",
        )  # fmt: skip
    elif column.declared != column.base:
        yield Deviation(
            relation.name, Severity.RISK,
            f'has the column "{column.name}" of the domain {column.declared}, which may reject lines',
            f"{_drop_readers(column)}{alter} ALTER COLUMN {column.name} TYPE {kind};",
        )  # fmt: skip
    if column.name in _OPTIONAL and column.required:
        yield Deviation(
            relation.name, Severity.RISK,
            f'requires the column "{column.name}", so lines without it are rejected',
            f"{alter} ALTER COLUMN {column.name} DROP NOT NULL;",
        )  # fmt: skip


def _drop_readers(column: Any) -> str:
    """Return the statements that must run before a column can change its type.

    `loader init` recreates our views and questions.
    """
    readers = (("VIEW", column.views), ("FUNCTION", column.functions))
    return "".join(f"DROP {kind} {', '.join(names)}; " for kind, names in readers if names)


def _type_change(column: Any, kind: str) -> str | None:
    """Return the clauses that change the type of a column, or None if its values cannot be converted."""
    name = column.name
    if kind == "timestamptz" and column.base.startswith("timestamp"):
        using = f"{name} AT TIME ZONE 'UTC'" if "without" in column.base else f"{name}::timestamptz"
    elif kind == "numeric" or (kind == "bigint" and "int" in column.base):
        using = f"{name}::{kind}"
    elif _TEXTUAL.fullmatch(column.base):
        using = f"{name}::text::{kind}"
    elif kind == "text" or kind.startswith("varchar"):
        using = f"{name}::text"
    else:
        return None
    clauses = [f"ALTER COLUMN {name} TYPE {kind} USING {using}"]
    if column.has_default:  # it may not have the new type
        clauses.insert(0, f"ALTER COLUMN {name} DROP DEFAULT")
        if name in _DEFAULTS:
            clauses.append(f"ALTER COLUMN {name} SET DEFAULT {_DEFAULTS[name]}")
    return ", ".join(clauses)


def _width(kind: str) -> float:
    """Return the maximum length of a type in characters."""
    found = re.fullmatch(r"(?:character varying|varchar)\((\d+)\)", kind)
    return int(found[1]) if found else float("inf")


def _uniqueness(relation: Any, indexes: Sequence[Any]) -> Iterator[Deviation]:
    key = _KEYS[relation.name]
    unique = [index for index in indexes if index.is_plain and index.columns == [key]]
    if any(index.is_valid and index.is_immediate for index in unique):
        return
    problem, alter = f'does not ensure that "{key}" is unique', f"ALTER TABLE {relation.shown}"
    if any(not index.is_valid for index in unique):
        remedy = f"REINDEX INDEX CONCURRENTLY {unique[0].name};"
    elif unique:
        kind = "PRIMARY KEY" if unique[0].is_primary else "UNIQUE"
        problem = (
            f'checks that "{key}" is unique only at the end of a transaction, because its constraint is '
            "deferrable"
        )
        remedy = f"{alter} DROP CONSTRAINT {_quoted(unique[0].constraint_name)}, ADD {kind} ({key});"
    elif relation.kind == "p":
        yield _moved_away(relation, f"{problem}, because it is partitioned by another column")
        return
    else:
        remedy = f"{alter} ADD UNIQUE ({key});"
    yield Deviation(relation.name, Severity.REFUSED, problem, remedy)


def _row_security(relation: Any) -> Iterator[Deviation]:
    problem = "has row-level security, so COPY is refused for the loader's role"
    remedy = (
        f"ALTER TABLE {relation.shown} DISABLE ROW LEVEL SECURITY; or ALTER ROLE analytics_loader BYPASSRLS;"
    )
    if relation.has_active_row_security:
        yield Deviation(relation.name, Severity.BLOCKED, problem, remedy)
    elif relation.has_row_security and relation.is_owned:
        yield Deviation(relation.name, Severity.RISK, problem, remedy)


def _hook(relation: Any, hook: Any) -> Deviation:
    name = _quoted(hook.name)
    if hook.blocks:
        return Deviation(
            relation.name, Severity.BLOCKED, f"has the rule {name}, so duplicates stop the load",
            f"DROP RULE {name} ON {relation.shown};",
        )  # fmt: skip
    return Deviation(
        relation.name, Severity.RISK, f"has the trigger {name}, which may change, refuse or lose rows",
        f"ALTER TABLE {relation.shown} DISABLE TRIGGER {name};",
    )  # fmt: skip


def _moved_away(relation: Any, problem: str) -> Deviation:
    kind = {"v": "VIEW", "m": "MATERIALIZED VIEW", "f": "FOREIGN TABLE", "S": "SEQUENCE"}.get(
        relation.kind, "TABLE"
    )
    remedy = (
        f"ALTER {kind} {relation.shown} RENAME TO {relation.name}_old; then `loader init` creates the table"
    )
    return Deviation(relation.name, Severity.REFUSED, problem, remedy)


def _quoted(name: str) -> str:
    """Return an identifier as SQL."""
    return '"' + name.replace('"', '""') + '"'


def _rows(connection: Connection, statement: str, *values: object) -> list[Any]:
    with connection.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(statement.encode(), values).fetchall()


def _by_relation(rows: Sequence[Any]) -> defaultdict[int, list[Any]]:
    found: defaultdict[int, list[Any]] = defaultdict(list)
    for row in rows:
        found[row.relation].append(row)
    return found
