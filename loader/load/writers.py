"""The accounts of writers in the database (`analytics_writers`), and the sum that proves that no line is lost.

Rows are only added, because the loader's role may not change any. The last row of a writer is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from loader.files.writers import Stated
from loader.load import lowwater
from loader.load.database import Connection, has_column

VERSION: Final = 4
"""The first schema version with accounts."""
_MAY: Final = (
    "SELECT coalesce(pg_catalog.has_table_privilege(pg_catalog.to_regclass('analytics_writers')::oid, 'INSERT') "
    "AND pg_catalog.has_table_privilege(pg_catalog.to_regclass('analytics_writers')::oid, 'SELECT') "
    "AND pg_catalog.has_table_privilege(pg_catalog.to_regclass('analytics_conservation')::oid, 'SELECT'), false)"
)
_RECORD: Final = """
    INSERT INTO analytics_writers (writer, segments, lines, begun, dropped, pending_segments, pending_lines, ended)
    SELECT * FROM (VALUES (%s::text, %s::bigint, %s::bigint, %s::bigint, %s::bigint, %s::bigint[], %s::bigint[],
        %s::boolean)) AS now (writer, segments, lines, begun, dropped, pending_segments, pending_lines, ended)
    WHERE NOT EXISTS (
        SELECT FROM (
            SELECT * FROM analytics_writers AS each WHERE each.writer = now.writer
            ORDER BY reported_at DESC LIMIT 1
        ) AS last
        WHERE last.segments = now.segments AND last.lines = now.lines AND last.begun = now.begun
            AND last.dropped = now.dropped AND last.pending_segments::text = now.pending_segments::text
            AND last.pending_lines::text = now.pending_lines::text AND last.ended = now.ended
    )
"""
_SHOWN: Final = 10
_SUM: Final = """
    WITH each AS MATERIALIZED (SELECT * FROM analytics_conservation),
    absent AS (SELECT pg_catalog.unnest(missing_segments) AS segment FROM each)
    SELECT pg_catalog.count(*), coalesce(pg_catalog.sum(emitted), 0)::bigint,
        coalesce(pg_catalog.sum(rows), 0)::bigint, coalesce(pg_catalog.sum(duplicates), 0)::bigint,
        coalesce(pg_catalog.sum(rejects), 0)::bigint, coalesce(pg_catalog.sum({erased}), 0)::bigint,
        coalesce(pg_catalog.sum(dropped), 0)::bigint,
        coalesce(pg_catalog.sum(pending), 0)::bigint, coalesce(pg_catalog.sum(missing), 0)::bigint,
        coalesce(pg_catalog.array_agg(writer) FILTER (WHERE missing <> 0::bigint), ARRAY[]::text[]),
        ARRAY(SELECT segment FROM absent ORDER BY segment LIMIT {shown}), (SELECT pg_catalog.count(*) FROM absent),
        coalesce(pg_catalog.sum({expired}), 0)::bigint
    FROM each
"""


@dataclass(frozen=True)
class Conservation:
    """The totals over all writers: `emitted` must be the sum of the others. See the view."""

    writers: int
    emitted: int
    rows: int
    duplicates: int
    rejects: int
    erased: int
    dropped: int
    pending: int
    missing: int
    unbalanced: Sequence[str]
    """Writers with missing lines, or with more lines than in their accounts."""
    missing_segments: Sequence[str]
    """The first missing segments."""
    missing_segment_count: int
    expired: int

    @property
    def holds(self) -> bool:
        return not self.unbalanced and not self.missing_segments


def may_record(connection: Connection) -> bool:
    """Whether the tables support accounts and the role may add them. Raises psycopg.Error."""
    return connection.execute(_MAY).fetchone() == (True,)


def record(connection: Connection, stated: Sequence[Stated]) -> None:
    """Add the accounts that have changed. Raises psycopg.Error."""
    for each in stated:
        said, numbers = each.statement, sorted(each.pending)
        values = (said.writer, said.segments, said.lines, said.begun, said.dropped)
        lines = [each.pending[number] for number in numbers]
        connection.execute(_RECORD.encode(), [*values, numbers, lines, each.ended])


def last_loaded(connection: Connection) -> dict[str, int]:
    """Return the last segment of each writer in the ledger. Raises psycopg.Error."""
    last = "segment + segments - 1::bigint" if lowwater.exist(connection) else "segment"
    statement = (
        f"SELECT writer, pg_catalog.max({last}) FROM analytics_loads WHERE writer IS NOT NULL GROUP BY writer"
    )
    return dict(connection.execute(statement.encode()).fetchall())


def conservation(connection: Connection) -> Conservation:
    """Return the totals over all writers. Raises psycopg.Error."""
    later = {
        name: name if has_column(connection, "analytics_conservation", name) else "0"
        for name in ("erased", "expired")
    }
    (row,) = connection.execute(_SUM.format(shown=_SHOWN, **later).encode()).fetchall()
    return Conservation(*row)
