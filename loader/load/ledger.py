"""The ledger, `analytics_loads`: one row for each chunk, keyed by the digest of the chunk's bytes.

The rows of a writer's segments are merged when their hour ended an hour ago (schema.sql, analytics_merge_loads). After
that, a segment is recognized only by its own name. The lines of a copy with another name are compared one by one, and
are duplicates.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

from psycopg import sql

from loader.errors import LoaderError
from loader.files.chunk import Chunk
from loader.load import lowwater
from loader.load.counts import Counts
from loader.load.database import Connection, transaction
from loader.load.triggers import triggers
from spool.segment import SEALED, SegmentName

TABLE: Final = "analytics_loads"


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: the origin of a chunk and the counts of its lines."""

    digest: bytes
    file: str
    byte_offset: int
    bytes: int
    counts: Counts

    def values(self) -> tuple[Any, ...]:
        """Return the values of `_COLUMNS` and of `_LATER_COLUMNS`."""
        counts = self.counts
        return (
            self.digest, self.file, self.byte_offset, self.bytes, counts.lines, counts.events, counts.metrics,
            counts.duplicates, counts.rejected, counts.erased, counts.expired,
        )  # fmt: skip


_COLUMNS: Final[Mapping[str, LiteralString]] = {
    "digest": "bytea", "file": "text", "byte_offset": "bigint", "bytes": "bigint", "lines": "bigint",
    "events": "bigint", "metrics": "bigint", "duplicates": "bigint", "rejected": "bigint",
}  # fmt: skip
"""The columns written by the loader, with their types."""
_LATER_COLUMNS: Final[Mapping[str, LiteralString]] = {"erased": "bigint", "expired": "bigint"}
"""Columns that tables of version 4 lack; they are written only if a count is not 0."""


def _recording(columns: Mapping[str, LiteralString]) -> sql.Composed:
    return sql.SQL(
        "INSERT INTO analytics_loads ({}, loader_host) SELECT entry.*, %s FROM unnest({}) AS entry "
        "ON CONFLICT (digest) DO NOTHING RETURNING digest"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.SQL("%s::{}[]").format(sql.SQL(kind)) for kind in columns.values()),
    )


_RECORD: Final = _recording(_COLUMNS)
_RECORD_ALL: Final = _recording({**_COLUMNS, **_LATER_COLUMNS})
_MERGED: Final = """
    SELECT digest FROM ROWS FROM (pg_catalog.unnest(%s::bytea[]), pg_catalog.unnest(%s::text[]),
        pg_catalog.unnest(%s::bigint[])) AS wanted (digest, writer, segment)
    CROSS JOIN LATERAL (
        SELECT merged.segment AS first, segments, digests FROM analytics_loads AS merged
        WHERE digests IS NOT NULL AND merged.writer = wanted.writer AND merged.segment <= wanted.segment
        ORDER BY merged.segment DESC LIMIT 1
    ) AS run
    WHERE wanted.segment < first + segments
        AND pg_catalog.substr(digests, (8 * (wanted.segment - first) + 1)::int, 8)
            = pg_catalog.substr(wanted.digest, 1, 8)
"""
"""Finds a whole segment in the ledger row that its own row was merged into."""


def known(connection: Connection, chunks: Sequence[Chunk]) -> set[bytes]:
    """Return the digests of the chunks that are already in the ledger. Raises psycopg.Error."""
    found = _having(connection, [chunk.digest for chunk in chunks])
    rest = [
        (chunk.digest, *name) for chunk in chunks if chunk.digest not in found for name in _segment(chunk)
    ]
    if rest and lowwater.exist(connection):
        found |= {
            digest
            for (digest,) in connection.execute(_MERGED, [list(each) for each in zip(*rest, strict=True)])
        }
    return found


def _having(connection: Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Return the digests that have a ledger row of their own."""
    found = connection.execute("SELECT digest FROM analytics_loads WHERE digest = ANY(%s)", [list(digests)])
    return {digest for (digest,) in found}


def _segment(chunk: Chunk) -> Iterator[tuple[str, int]]:
    """Yield the writer and number of a chunk's segment, if the chunk is at the beginning of one."""
    name = os.path.basename(chunk.file).removesuffix(".gz").removesuffix(".zst")
    if (
        chunk.offset == 0
        and name.endswith(SEALED)
        and (parsed := SegmentName.parse(name.removesuffix(SEALED)))
    ):
        yield parsed.writer, parsed.number


def record(connection: Connection, entries: Sequence[Entry]) -> set[bytes]:
    """Write ledger rows; return the digests of the new ones. The others were written by another loader.

    Rows are written in the order of the digests, so that two loaders cannot deadlock. Raises psycopg.Error,
    and LoaderError if the ledger does not store its rows.
    """
    if not entries:
        return set()
    ordered = sorted(entries, key=lambda entry: entry.digest)
    arrays = [list(column) for column in zip(*(entry.values() for entry in ordered), strict=True)]
    if any(entry.counts.erased or entry.counts.expired for entry in entries):
        statement = _RECORD_ALL
    else:
        statement, arrays = _RECORD, arrays[: len(_COLUMNS)]
    written = {digest for (digest,) in connection.execute(statement, [socket.gethostname(), *arrays])}
    digests = {entry.digest for entry in entries}
    if written != digests or triggers(connection, TABLE):
        _check_kept(connection, digests)
    return written


def merge(connection: Connection, stopped: Callable[[], bool] = lambda: False) -> int:
    """Merge the rows of hours that ended an hour ago. Return their number, 0 also if another session is merging.

    The connection must not be in a transaction. Raises psycopg.Error; UndefinedFunction if the tables are older.
    """
    total, since = 0, "-infinity"
    while not stopped():
        with transaction(connection):
            statement = "SELECT merged, until::text FROM analytics_merge_loads(%s::timestamptz)"
            found = connection.execute(statement, [since]).fetchall()
        if not found:
            break
        ((done, since),) = found
        total += done
    return total


def _check_kept(connection: Connection, digests: set[bytes]) -> None:
    if digests - _having(connection, list(digests)):
        causes = ", ".join(triggers(connection, TABLE))
        raise LoaderError(f"{TABLE} does not store its rows: remove its {causes}")
