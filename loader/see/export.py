"""Exports rows as Parquet, CSV, or NDJSON that `loader backfill` can load.

Rows are streamed from COPY to the file, in one snapshot and in constant memory. A file gets its name once it
is complete. Ids are text: pandas and DuckDB support Arrow's UUID, polars does not.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from pathlib import Path
from typing import IO, Any, Final

from psycopg import sql

from loader.errors import LoaderError, UsageError
from loader.load.database import Connection
from loader.see import names
from loader.see.catalogue import Format
from loader.see.period import midnight
from loader.see.whole import whole_file

STDOUT: Final = Path("-")
_BATCH_BYTES: Final = 1 << 20
"""The size of a piece from the driver; larger pieces are not faster."""
_ROW_GROUP: Final = 1 << 15
"""Rows per row group, about 10 MB before compression: the unit in which readers skip or read data."""
_COMPRESSION: Final = ("zstd", 3)


@dataclass(frozen=True)
class Source:
    """An exportable table: its columns, and the form of a row as a line."""

    table: str
    columns: tuple[tuple[str, sql.SQL], ...]
    document: str
    """The JSON column that `--column` reads."""
    line: tuple[tuple[str, sql.SQL], ...]
    """The values of a line as it is loaded, by name."""


EVENTS: Final = Source(
    "analytics_events",
    (
        ("event_id", sql.SQL("event_id::text")), ("event_type", sql.SQL("event_type::text")),
        ("timestamp", sql.SQL("timestamp")), ("user_id", sql.SQL("user_id::text")),
        ("family_unit_id", sql.SQL("family_unit_id::text")), ("session_id", sql.SQL("session_id::text")),
        ("metadata", sql.SQL("metadata::text")), ("created_at", sql.SQL("created_at")),
    ),
    "metadata",
    (
        ("event_id", sql.SQL("event_id")), ("event_type", sql.SQL("event_type")), ("timestamp", sql.SQL("timestamp")),
        ("user_id", sql.SQL("user_id")), ("family_unit_id", sql.SQL("family_unit_id")),
        ("session_id", sql.SQL("session_id")), ("metadata", sql.SQL("metadata")),
    ),
)  # fmt: skip
METRICS: Final = Source(
    "analytics_metrics",
    (
        ("id", sql.SQL("id::text")), ("metric_name", sql.SQL("metric_name::text")),
        ("metric_type", sql.SQL("metric_type::text")), ("value", sql.SQL("value::float8")),
        ("labels", sql.SQL("labels::text")), ("timestamp", sql.SQL("timestamp")),
        ("created_at", sql.SQL("created_at")),
    ),
    "labels",
    (
        ("event_id", sql.SQL("id")), ("metric_name", sql.SQL("metric_name")), ("metric_type", sql.SQL("metric_type")),
        ("value", sql.SQL("value")), ("labels", sql.SQL("coalesce(labels, '{}')")), ("timestamp", sql.SQL("timestamp")),
    ),
)  # fmt: skip
SOURCES: Final = {"events": EVENTS, "metrics": METRICS}
"""The sources, by the names in catalogue.TABLES."""

_NUMBER: Final = r"'^[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]{{1,3}})?$'"
# Text is cast only if that is possible: a failed cast would abort the export.
_IS_NUMBER: Final = "({text} ~ " + _NUMBER + ")"
_CASTS: Final = {
    "text": "{text}",
    "float": "CASE WHEN " + _IS_NUMBER + " THEN CASE WHEN abs({text}::numeric) BETWEEN 1e-300 AND 1e308 "
    "OR {text}::numeric = 0 THEN {text}::float8 END END",
    "int": "CASE WHEN " + _IS_NUMBER + " THEN CASE WHEN {text}::numeric % 1 = 0 AND {text}::numeric BETWEEN "
    "-9223372036854775808 AND 9223372036854775807 THEN {text}::numeric::bigint END END",
    "bool": "CASE {text} WHEN 'true' THEN true WHEN 'false' THEN false END",
}
"""SQL for each type of a column."""
_COLUMN: Final = re.compile(r"(metadata|labels)[.]([^:]+)(?::(\w+))?")


@dataclass(frozen=True)
class Column:
    """A JSON value that is exported as a column of its own."""

    document: str
    path: tuple[str, ...]
    type: str

    @property
    def name(self) -> str:
        """The last key of the path."""
        return self.path[-1]

    def value(self) -> sql.Composable:
        """Return SQL for the value, or NULL if it has a different type."""
        return sql.SQL(_CASTS[self.type]).format(text=self._text())

    def misfits(self) -> sql.Composable:
        """Return SQL that is 1 if the value has a different type, otherwise 0."""
        return sql.SQL("(({}) IS NULL AND {} IS NOT NULL)::int").format(self.value(), self._text())

    def _text(self) -> sql.Composable:
        keys = sql.SQL(", ").join(map(sql.Literal, self.path))
        return sql.SQL("({} #>> ARRAY[{}])").format(sql.Identifier(self.document), keys)


def column(text: str) -> Column:
    """Parse a column such as `metadata.duration_ms:float`. Raises UsageError."""
    parts = _COLUMN.fullmatch(text)
    kind = parts[3] or "text" if parts else ""
    if parts is None or kind not in _CASTS or not all(parts[2].split(".")):
        raise UsageError(
            f'--column "{text}" is not a column: write metadata.KEY:TYPE or labels.KEY:TYPE; '
            f"a type is one of {', '.join(_CASTS)}"
        )
    return Column(parts[1], tuple(parts[2].split(".")), kind)


@dataclass(frozen=True)
class Range:
    """The rows with `since <= timestamp < until`; None is unbounded."""

    since: datetime | None
    until: datetime | None

    def condition(self) -> sql.Composable:
        """Return the condition in SQL."""
        parts: list[sql.Composable] = [sql.SQL("true")]
        if self.since is not None:
            parts.append(sql.SQL("timestamp >= {}").format(sql.Literal(self.since.astimezone(UTC))))
        if self.until is not None:
            parts.append(sql.SQL("timestamp < {}").format(sql.Literal(self.until.astimezone(UTC))))
        return sql.SQL(" AND ").join(parts)


@dataclass
class Exported:
    """The result of an export."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    misfits: dict[str, int] = field(default_factory=dict)
    """Number of values, by column, that have a different type and became null."""


class Export:
    """An export: its source, range, columns and format."""

    def __init__(self, source: Source, form: Format, columns: Sequence[Column] = ()) -> None:
        """Create an export. Raises UsageError for columns that the table or the format does not support."""
        names = [name for name, _ in source.columns] + [each.name for each in columns]
        for each in columns:
            if form == "ndjson":
                raise UsageError("--column requires Parquet or CSV: NDJSON has the lines as they were loaded")
            if each.document != source.document:
                raise UsageError(
                    f"{source.table} has no {each.document}: its columns are {source.document}.KEY"
                )
            if names.count(each.name) > 1:
                raise UsageError(f'two columns would have the name "{each.name}": leave one out')
        self._source, self._form, self._columns = source, form, columns
        self.exported = Exported()

    def to_file(self, connection: Connection, rows: Range, target: Path) -> None:
        """Write to one file or to standard output. Raises OSError, LoaderError, psycopg.Error."""
        if target == STDOUT:
            self._write(connection, rows, sys.stdout.buffer)
            return
        with whole_file(target) as file:
            self._write(connection, rows, file)
            self.exported.bytes += file.tell() if file.seekable() else 0
        self.exported.files += 1

    def by_day(self, connection: Connection, rows: Range, target: Path, zone: tzinfo) -> None:
        """Write `day=2026-11-24/part.parquet` for each local day that has rows.

        The file of a day without rows is removed: it is from an earlier export, before the rows were deleted.
        """
        for day, part in self._days(connection, rows, zone):
            file = target / f"day={day}" / f"part.{self._form}"
            if self._has_rows(connection, part):
                file.parent.mkdir(parents=True, exist_ok=True)
                self.to_file(connection, part, file)
            else:
                file.unlink(missing_ok=True)

    def _days(self, connection: Connection, rows: Range, zone: tzinfo) -> Iterator[tuple[date, Range]]:
        statement = sql.SQL("SELECT min(timestamp), max(timestamp) FROM {} WHERE {}")
        ((first, last),) = connection.execute(
            statement.format(self._table(connection), rows.condition())
        ).fetchall()
        if first is None and (rows.since is None or rows.until is None):
            return
        begin = rows.since or first
        end = rows.until or last + timedelta(microseconds=1)
        day = begin.astimezone(zone).date()
        while (starts := midnight(day, zone).astimezone(UTC)) < end:
            ends = midnight(day + timedelta(days=1), zone).astimezone(UTC)
            yield day, Range(max(starts, begin), min(ends, end))
            day += timedelta(days=1)

    def _has_rows(self, connection: Connection, rows: Range) -> bool:
        statement = sql.SQL("SELECT EXISTS (SELECT 1 FROM {} WHERE {})")
        ((exists,),) = connection.execute(
            statement.format(self._table(connection), rows.condition())
        ).fetchall()
        return bool(exists)

    def _table(self, connection: Connection) -> sql.Identifier:
        return names.table(connection, self._source.table)

    def _write(self, connection: Connection, rows: Range, file: IO[bytes]) -> None:
        write = {"parquet": self._parquet, "csv": self._csv, "ndjson": self._ndjson}[self._form]
        write(connection, rows, file)

    def _select(
        self, connection: Connection, rows: Range, extra: Sequence[sql.Composable] = ()
    ) -> sql.Composed:
        named = [*self._source.columns, *((each.name, each.value()) for each in self._columns)]
        listed = [sql.SQL("{} AS {}").format(value, sql.Identifier(name)) for name, value in named]
        parts = sql.SQL(", ").join([*listed, *extra])
        return sql.SQL("SELECT {} FROM {} WHERE {}").format(parts, self._table(connection), rows.condition())

    def _ndjson(self, connection: Connection, rows: Range, file: IO[bytes]) -> None:
        # JSON has no control characters, so CSV with these two as quote and delimiter is the plain text.
        # Not row_to_json of a subquery: Citus passes it to the workers as a ROW without names of columns.
        line = sql.SQL(", ").join(
            part for name, value in self._source.line for part in (sql.Literal(name), value)
        )
        query = sql.SQL("SELECT json_build_object({}) FROM {} WHERE {}").format(
            line, self._table(connection), rows.condition()
        )
        self._copy(connection, query, "FORMAT csv, QUOTE E'\\x01', ESCAPE E'\\x01', DELIMITER E'\\x02'", file)

    def _csv(self, connection: Connection, rows: Range, file: IO[bytes]) -> None:
        self._copy(connection, self._select(connection, rows), "FORMAT csv, HEADER", file)
        for each in self._columns:
            self._count_misfits(connection, rows, each)

    def _copy(self, connection: Connection, query: sql.Composed, form: str, file: IO[bytes]) -> None:
        statement = sql.SQL("COPY ({}) TO STDOUT ({})").format(query, sql.SQL(form))
        with connection.cursor() as cursor:
            with cursor.copy(statement) as copied:
                for block in copied:
                    file.write(block)
            self.exported.rows += cursor.rowcount

    def _count_misfits(self, connection: Connection, rows: Range, each: Column) -> None:
        statement = sql.SQL("SELECT coalesce(sum({}), 0) FROM {} WHERE {}")
        query = statement.format(each.misfits(), self._table(connection), rows.condition())
        ((found,),) = connection.execute(query).fetchall()
        self._misfits(each, found)

    def _misfits(self, each: Column, found: int) -> None:
        if found:
            self.exported.misfits[each.name] = self.exported.misfits.get(each.name, 0) + int(found)

    def _parquet(self, connection: Connection, rows: Range, file: IO[bytes]) -> None:
        extra = [
            sql.SQL("{} AS {}").format(each.misfits(), sql.Identifier(f"misfits {number}"))
            for number, each in enumerate(self._columns)
        ]
        ((snapshot,),) = connection.execute("SELECT pg_export_snapshot()").fetchall()
        query = self._select(connection, rows, extra).as_string(connection)
        with _arrow(connection, str(snapshot), query) as reader:
            self._write_groups(reader, file)

    def _write_groups(self, reader: Any, file: IO[bytes]) -> None:
        """Write row groups of equal size, regardless of the driver's pieces."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        wide = len(self._source.columns) + len(self._columns)
        schema = pa.schema([reader.schema.field(at) for at in range(wide)])
        kind, level = _COMPRESSION
        with pq.ParquetWriter(file, schema, compression=kind, compression_level=level) as writer:
            for table in _grouped(reader):
                for number, each in enumerate(self._columns):
                    self._misfits(each, pc.sum(table.column(wide + number)).as_py() or 0)
                self.exported.rows += table.num_rows
                writer.write_table(table.select(range(wide)))


def _grouped(reader: Any) -> Iterator[Any]:
    import pyarrow as pa

    waiting, rows = [], 0
    for batch in reader:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= _ROW_GROUP:
            yield pa.Table.from_batches(waiting)
            waiting, rows = [], 0
    if rows:
        yield pa.Table.from_batches(waiting)


@contextlib.contextmanager
def _arrow(connection: Connection, snapshot: str, query: str) -> Iterator[Any]:
    """Run a query with Arrow's driver, in the snapshot of our connection. Raises LoaderError."""
    import adbc_driver_manager as adbc  # its module dbapi imports pandas and polars: 78 MiB
    import adbc_driver_postgresql
    import pyarrow as pa

    ((path,),) = connection.execute("SELECT current_setting('search_path')").fetchall()
    dsn = _pinned(connection)
    settings = (
        sql.SQL("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"),
        sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)),
        sql.SQL("SET LOCAL TIME ZONE 'UTC'"),
        sql.SQL("SET LOCAL jit = off"),
        sql.SQL("SELECT pg_catalog.set_config('search_path', {}, true)").format(sql.Literal(path)),
    )
    try:
        with adbc_driver_postgresql.connect(dsn) as database, adbc.AdbcConnection(database) as other:
            other.set_autocommit(False)
            with adbc.AdbcStatement(other) as statement:
                for setting in settings:
                    statement.set_sql_query(setting.as_string(connection))
                    statement.execute_update()
                statement.set_options(**{"adbc.postgresql.batch_size_hint_bytes": str(_BATCH_BYTES)})
                statement.set_sql_query(query)
                stream, _ = statement.execute_query()
                with pa.RecordBatchReader.from_stream(stream) as reader:
                    yield reader
    except adbc.Error as error:
        raise LoaderError(f"the export failed: {error}") from error


def _pinned(connection: Connection) -> str:
    """Return the connection's DSN with a search path, because the driver looks up types before we can set one.

    Its query compares types without an exact operator, so an operator planted in one of the user's schemas
    could match better (adbc-driver-postgresql 1.13). A pooler may refuse the parameter; then only CSV and
    NDJSON are possible.
    """
    info = connection.info
    dsn = info.dsn
    if info.password:
        dsn += f" password={_quoted(info.password)}"
    return dsn + f" options={_quoted(f'{info.options} -csearch_path=pg_catalog,pg_temp'.strip())}"


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
