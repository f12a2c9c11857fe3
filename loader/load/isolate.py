"""Isolates the rows of a batch that Postgres refuses or does not store, and stores the others.

    staging     COPY into a table of text columns, converted afterwards: finds values refused by a column's type
    together    all rows in one statement, except those refused by a foreign key (found by an anti-join)
                and those without an identity that the table requires
    row by row  if that fails; in the server, about 30 us each. Any refusal then concerns a single row

Row by row uses a PL/pgSQL block with an exception handler: no other row is affected, and nothing is sent
twice. A code that means an outage is re-raised, unless a function raised it (sqlstate.py). If no row at all
was stored, the code is one that a person must do something about, and the newest row of the table could not
be inserted now either, then the configuration is at fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import psycopg
from psycopg import sql

from loader.load.copying import copying
from loader.load.database import Connection, is_distributed
from loader.load.decode import Reject, Row
from loader.load.sqlstate import (
    MIGRATION_CHECKS,
    Action,
    action,
    concerns_no_row,
    is_temporary,
    retry_pattern,
)
from loader.load.staging import Inserted, NotStoredError, Staging
from loader.load.tables import Table
from loader.load.triggers import not_stored, triggers

_COPY_LINE: Final = re.compile(r", line (\d+)")
_UNIQUE: Final = "postgres_23505"


class AllRefusedError(Exception):
    """The cause of an error that refused every row of a batch, but not an INSERT without rows."""


def insert_isolating(connection: Connection, table: Table, rows: Sequence[Row]) -> Inserted:
    """Insert rows, each once, and return the refused ones. Raises psycopg.Error if no row is at fault."""
    with connection.transaction():
        staging = Staging(connection, table)
        refused = _stage(staging, rows)
        return Inserted(refused=refused) + _insert(staging)


def _insert(staging: Staging) -> Inserted:
    """Insert as many rows as possible in one statement, without those refused by a foreign key."""
    orphans: dict[int, Reject] = {}
    while True:
        try:
            return staging.insert() + Inserted(refused=orphans)
        except NotStoredError:
            return _insert_each(staging, None) + Inserted(refused=orphans)
        except psycopg.errors.ForeignKeyViolation as error:
            found = _orphans(staging, error.diag.constraint_name)
            if not found:
                return _insert_each(staging, error) + Inserted(refused=orphans)
            staging.discard(found)
            orphans |= found
        except psycopg.errors.NotNullViolation as error:
            found = _without_identity(staging, error.diag.column_name)
            if not found:
                return _insert_each(staging, error) + Inserted(refused=orphans)
            staging.discard(found)
            orphans |= found
        except psycopg.Error as error:
            if concerns_no_row(error, distributed=is_distributed(staging.connection)):
                raise
            return _insert_each(staging, error) + Inserted(refused=orphans)


# ---- foreign keys -----------------------------------------------------------------------------------

_FOREIGN_KEY: Final = """
    SELECT confrelid::pg_catalog.regclass::pg_catalog.text, parent.relname,
        pg_catalog.array_agg(ours.attname ORDER BY place),
        pg_catalog.array_agg(theirs.attname ORDER BY place),
        NOT parent.relrowsecurity AND pg_catalog.has_schema_privilege(parent.relnamespace, 'USAGE')
            AND pg_catalog.bool_and(pg_catalog.has_column_privilege(parent.oid, theirs.attnum, 'SELECT'))
    FROM pg_catalog.pg_constraint AS known
    JOIN pg_catalog.pg_class AS parent ON parent.oid = confrelid
    CROSS JOIN LATERAL ROWS FROM (pg_catalog.unnest(conkey), pg_catalog.unnest(confkey))
        WITH ORDINALITY AS pair (our, their, place)
    JOIN pg_catalog.pg_attribute AS ours ON ours.attrelid = conrelid AND ours.attnum = our
    JOIN pg_catalog.pg_attribute AS theirs ON theirs.attrelid = confrelid AND theirs.attnum = their
    WHERE conrelid = {table_name}::pg_catalog.regclass::pg_catalog.oid AND conname = %s AND contype = 'f'
    GROUP BY known.oid, confrelid, parent.oid, parent.relname
"""


def _orphans(staging: Staging, constraint: str | None) -> dict[int, Reject]:
    """Return the rows without a parent row, if the loader may read the parent table and no trigger changes rows."""
    found = staging.run(_FOREIGN_KEY, constraint).fetchall()
    if len(found) != 1 or not found[0][-1] or triggers(staging.connection, staging.table):
        return {}
    ((parent, name, ours, theirs, _),) = found
    if not set(ours) <= set(staging.table.columns):
        return {}
    same = sql.SQL(" AND ").join(
        sql.SQL("{} = {}").format(sql.Identifier("parent", their), sql.Identifier("staged", our))
        for our, their in zip(ours, theirs, strict=True)
    )
    columns = [sql.Identifier("staged", column) for column in ours]
    values = sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns)
    complete = sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(column) for column in columns)
    without = staging.run(
        "SELECT position, pg_catalog.concat_ws(', ', {values}) FROM {staging} AS staged WHERE {complete} "
        "AND NOT EXISTS (SELECT FROM {parent} AS parent WHERE {same})",
        values=values, complete=complete, same=same, parent=sql.SQL(parent),
    )  # fmt: skip
    words = (
        f'insert or update on table "{staging.table.name}" violates foreign key constraint "{constraint}": '
        f'Key ({", ".join(ours)})=({{}}) is not present in table "{name}".'
    )
    return {position: Reject("postgres_23503", words.format(key)) for position, key in without}


# ---- identity ---------------------------------------------------------------------------------------

_IDENTITY: Final = ("user_id", "family_unit_id")
_NOT_NULL: Final = "23502"


def _without_identity(staging: Staging, column: str | None) -> dict[int, Reject]:
    """Return the rows without a user or a family, if this was the refused column and no trigger adds it."""
    if column not in _IDENTITY or triggers(staging.connection, staging.table):
        return {}
    found = staging.run(
        "SELECT position FROM {staging} WHERE {column} IS NULL", column=sql.Identifier(column)
    )
    reject = Reject(f"postgres_{_NOT_NULL}", _missing_identity(column))
    return {position: reject for (position,) in found}


def _missing_identity(column: str) -> str:
    return (
        f'null value in column "{column}", which the table requires: `loader init --optional-identity` '
        "accepts events without it, then run `loader rejects retry`"
    )


# ---- row by row -------------------------------------------------------------------------------------

_ROW_BY_ROW: Final = """
    DECLARE
        each record;
        detail text;
        context text;
        violated_check text;
    BEGIN
        FOR each IN SELECT * FROM {source} WHERE position = ANY(positions) ORDER BY {key}, position LOOP
            BEGIN
                INSERT INTO {target} ({columns}) VALUES ({values});
            EXCEPTION WHEN query_canceled OR assert_failure OR OTHERS THEN
                GET STACKED DIAGNOSTICS code = RETURNED_SQLSTATE, words = MESSAGE_TEXT,
                    detail = PG_EXCEPTION_DETAIL, context = PG_EXCEPTION_CONTEXT,
                    violated = COLUMN_NAME, violated_check = CONSTRAINT_NAME;
                IF (code ~ {outage} OR code = '23514' AND violated_check = ANY ({waits}))
                    AND pg_catalog.split_part(context, E'\\n', 1) !~ 'RAISE'
                THEN
                    RAISE;
                END IF;
                words := pg_catalog.concat_ws(': ', words, nullif(detail, ''));
                refused := each.position;
                RETURN NEXT;
            END;
        END LOOP;
    END
"""
_CREATE: Final = (
    "CREATE OR REPLACE FUNCTION pg_temp.loader_each_row(positions int[]) "
    "RETURNS TABLE (refused int, code text, words text, violated text) LANGUAGE plpgsql AS {body}"
)
_NOT_ON_WORKERS: Final = "SET LOCAL citus.enable_ddl_propagation = off"
"""Citus creates a function on its workers, too, and refuses that after an insert."""


def _insert_each(staging: Staging, error: psycopg.Error | None) -> Inserted:
    """Insert non-existing rows one by one. Raises `error` if the configuration is at fault."""
    if error is not None:
        staging.run("INSERT INTO {table} ({all}) SELECT {all} FROM {staging} WHERE false")
    existing = staging.compare()
    new = sorted(staging.keys.keys() - existing.positions())
    refused = _row_by_row(
        staging, new, staging.name, sql.Identifier(staging.table.name), staging.table.columns,
        [sql.Identifier("each", column) for column in staging.table.columns],
    )  # fmt: skip
    compared = staging.compare([position for position, reject in refused.items() if reject.code == _UNIQUE])
    for position in compared.positions():
        del refused[position]
    stored = [
        position for position in new if position not in refused and position not in compared.positions()
    ]
    absent: Iterable[int] = ()
    if causes := triggers(staging.connection, staging.table):
        absent = staging.absent(stored)
    none_stored = len(stored) == len(list(absent))
    may_be_configuration = none_stored and not all(map(_is_of_row, refused.values()))
    if error is not None and may_be_configuration and not _accepts_newest(staging):
        raise error from AllRefusedError()
    lost = dict.fromkeys(absent, not_stored(staging.table, causes))
    return existing + compared + Inserted(refused=refused | lost)


def _accepts_newest(staging: Staging) -> bool:
    """Whether a copy of the newest row could be inserted now: then not every row is refused."""
    table = staging.table
    values = [
        sql.SQL("pg_catalog.gen_random_uuid()") if column in ("id", table.key) else sql.Identifier(column)
        for column in table.columns
    ]
    try:
        with staging.connection.transaction(force_rollback=True):
            copied = staging.run(
                "INSERT INTO {table} ({all}) SELECT {values} FROM {table} ORDER BY {key} DESC LIMIT 1 RETURNING 1",
                values=sql.SQL(", ").join(values),
            )
            return copied.fetchone() is not None
    except psycopg.Error as error:
        if concerns_no_row(error, distributed=is_distributed(staging.connection)):
            raise
        return False


def _is_of_row(reject: Reject) -> bool:
    return action(reject.code.removeprefix("postgres_")) is Action.REJECT


def _row_by_row(
    staging: Staging, positions: Sequence[int], source: sql.Identifier, target: sql.Identifier,
    columns: Iterable[str], values: Iterable[sql.Composable],
) -> dict[int, Reject]:  # fmt: skip
    """Insert rows of a table with positions into another table one by one; return the refused ones."""
    distributed = is_distributed(staging.connection)
    body = staging.format(
        _ROW_BY_ROW, source=source, target=target, values=sql.SQL(", ").join(values),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        outage=sql.Literal(retry_pattern(distributed=distributed)),
        waits=sql.Literal([] if distributed else ["", *MIGRATION_CHECKS]),
    )  # fmt: skip
    if distributed:
        staging.run(_NOT_ON_WORKERS)
    staging.run(_CREATE, body=sql.Literal(body.as_string(staging.connection)))
    found = staging.run("SELECT * FROM pg_temp.loader_each_row(%s::int[])", list(positions))
    return {
        position: Reject(
            f"postgres_{code}",
            _missing_identity(column) if code == _NOT_NULL and column in _IDENTITY else words,
        )
        for position, code, words, column in found
    }  # fmt: skip


# ---- staging ----------------------------------------------------------------------------------------

_TYPES: Final = """
    SELECT pg_catalog.format_type(atttypid, NULL) FROM pg_catalog.unnest({all_columns}::name[])
        WITH ORDINALITY AS wanted (name, place)
    JOIN pg_catalog.pg_attribute ON attname = name
        AND attrelid = {table_name}::pg_catalog.regclass::pg_catalog.oid ORDER BY place
"""


def _stage(staging: Staging, rows: Sequence[Row]) -> dict[int, Reject]:
    """Fill the staging table; return the rows with a value that the type of its column does not accept."""
    columns = staging.table.columns
    texts = sql.Identifier("pg_temp", f"texts_{staging.table.name}")
    staging.create()
    definition = sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(column)) for column in columns)
    staging.run(
        "CREATE TEMP TABLE IF NOT EXISTS {texts} (position int, {definition}) ON COMMIT DELETE ROWS",
        texts=texts, definition=definition,
    )  # fmt: skip
    staging.run("TRUNCATE {texts}", texts=texts)
    refused = _send(staging.connection, texts, columns, list(enumerate(row.copy for row in rows)))
    staging.keys = {position: row.event_id for position, row in enumerate(rows) if position not in refused}
    kinds = [kind for (kind,) in staging.run(_TYPES)]
    converted = [
        sql.SQL("{}::{}").format(sql.Identifier("each", column), sql.SQL(kind))
        for column, kind in zip(columns, kinds, strict=True)
    ]
    unfit = _convert(staging, texts, converted)
    for position in unfit:
        del staging.keys[position]
    return refused | unfit


def _convert(
    staging: Staging, texts: sql.Identifier, converted: Sequence[sql.Composable]
) -> dict[int, Reject]:
    try:
        with staging.connection.transaction():
            staging.run(
                "INSERT INTO {staging} SELECT position, {converted} FROM {texts} AS each",
                converted=sql.SQL(", ").join(converted), texts=texts,
            )  # fmt: skip
            return {}
    except psycopg.Error as error:
        if is_temporary(error):
            raise
    columns = ("position", *staging.table.columns)
    values = [sql.Identifier("each", "position"), *converted]
    return _row_by_row(staging, sorted(staging.keys), texts, staging.name, columns, values)


def _send(
    connection: Connection, target: sql.Identifier, columns: Sequence[str], rows: Sequence[tuple[int, str]]
) -> dict[int, Reject]:
    """COPY rows, and return the refused ones, which have text that the database's encoding cannot represent."""
    try:
        with connection.transaction(), copying(connection, target, ("position", *columns)) as writer:
            for position, row in rows:
                writer.write(f"{position}\t{row}")
        return {}
    except psycopg.Error as error:
        if is_temporary(error) or action(error.sqlstate) is not Action.REJECT:
            raise
        if len(rows) == 1:
            return {rows[0][0]: Reject(f"postgres_{error.sqlstate}", _message(error))}
        refused: dict[int, Reject] = {}
        for part in filter(None, _split(rows, error)):
            refused |= _send(connection, target, columns, part)
        return refused


def _split(rows: Sequence[tuple[int, str]], error: psycopg.Error) -> list[Sequence[tuple[int, str]]]:
    """Split rows to isolate the offending one: halves, and separately the row that COPY names."""
    named = _COPY_LINE.search(error.diag.context or "")
    place = int(named[1]) - 1 if named else -1
    if not 0 <= place < len(rows):
        return _halves(rows)
    return [*_halves(rows[:place]), rows[place : place + 1], *_halves(rows[place + 1 :])]


def _halves(rows: Sequence[tuple[int, str]]) -> list[Sequence[tuple[int, str]]]:
    half = len(rows) // 2
    return [rows[:half], rows[half:]]


def _message(error: psycopg.Error) -> str:
    diagnostics = error.diag
    return ": ".join(filter(None, (diagnostics.message_primary or str(error), diagnostics.message_detail)))
