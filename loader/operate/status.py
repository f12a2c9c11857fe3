"""`loader status`: the backlog, the loaded rows and the rejects of a spool and its ledger."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from loader.files import rejects
from loader.files.lock import holder
from loader.files.scan import Backlog, backlog
from loader.files.waiting import waiting
from loader.files.writers import statements
from loader.load import lowwater, rollups
from loader.load.counts import Counts
from loader.load.database import Connection, has_column
from loader.load.dropped import dropped, unreported

_RATE_MINUTES: Final = 5


@dataclass(frozen=True)
class Spool(Backlog):
    """The status of a spool: backlog, loader and rejects."""

    directory: str
    loader: str | None
    reject_files: int
    rejected: Mapping[str, int]
    waiting_for_parents: int
    """Rejects of the last hour without a parent row, which the daemon retries."""
    unreported_drops: Mapping[str, int]
    """Lines that emitters dropped and no metric has reported yet."""


@dataclass(frozen=True)
class Ledger:
    """Totals of the ledger, and rows per second over the last five minutes."""

    chunks: int
    counts: Counts
    retried: int
    """Lines that were rejected at first and loaded later; `counts` includes them twice."""
    last_loaded_at: datetime | None
    rows_per_second: float
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Lines that emitters dropped, by cause and event type or metric name, as reported by their metrics."""

    def facts(self) -> dict[str, object]:
        """Return the values by the names that `loader status` prints."""
        return {
            "chunks": self.chunks, "lines": self.counts.lines, **asdict(self.counts), "retried": self.retried,
            "last_loaded_at": self.last_loaded_at, "rows_per_second": self.rows_per_second,
            "dropped": self.dropped,
        }  # fmt: skip


def spool(directory: Path) -> Spool:
    """Read the status of a spool. Raises LoaderError, OSError, ValueError (a damaged reject file)."""
    counted = list(reject_counts(directory))
    return Spool(
        **asdict(backlog(directory)),
        directory=str(directory),
        loader=holder(directory),
        reject_files=len(counted),
        rejected=dict(sum((codes for _, codes in counted), Counter()).most_common()),
        waiting_for_parents=sum(count for _, _, count in waiting(directory, {})),
        unreported_drops=unreported(
            report for statement, _ in statements(directory) for report in statement.unreported
        ),
    )


def reject_counts(directory: Path) -> Iterator[tuple[Path, Counter[str]]]:
    """Yield the reject files of a spool with their counts by code.

    A file that a loader removes between listing and reading is omitted. Raises the same errors as `spool()`.
    """
    for path in rejects.files(directory):
        with contextlib.suppress(FileNotFoundError):
            yield path, rejects.count([path])


def ledger(connection: Connection) -> Ledger:
    """Return the totals of the ledger. Raises psycopg.Error."""
    erased = "erased" if has_column(connection, "analytics_loads", "erased") else "0"
    # Of merged rows and of expired lines: tables of an earlier version have neither.
    segments, expired = ("segments", "expired") if lowwater.exist(connection) else ("1", "0")
    row = connection.execute(
        f"SELECT coalesce(pg_catalog.sum({segments}), 0)::bigint, coalesce(pg_catalog.sum(events), 0)::bigint, "
        "coalesce(pg_catalog.sum(metrics), 0)::bigint, coalesce(pg_catalog.sum(duplicates), 0)::bigint, "
        "coalesce(pg_catalog.sum(rejected), 0)::bigint, "
        f"coalesce(pg_catalog.sum({erased}), 0)::bigint, coalesce(pg_catalog.sum({expired}), 0)::bigint, "
        "pg_catalog.max(loaded_at), "
        "coalesce(pg_catalog.sum(events + metrics) FILTER "
        "(WHERE loaded_at > pg_catalog.now() - pg_catalog.make_interval(mins => %s::int)), 0)::float, "
        "coalesce(pg_catalog.sum(lines) FILTER (WHERE pg_catalog.starts_with(file, %s)), 0)::bigint "
        "FROM analytics_loads",
        [_RATE_MINUTES, f"{rejects.DIRECTORY}/"],
    ).fetchone()
    assert row is not None  # an aggregate returns one row
    chunks, *counts, last_loaded_at, recent_rows, retried = row
    return Ledger(
        chunks,
        Counts(*counts),
        retried,
        last_loaded_at,
        recent_rows / (60 * _RATE_MINUTES),
        dropped(connection),
    )


def touched(connection: Connection) -> rollups.Touched | None:
    """Return the touched hours, or None if the tables have no rollups yet. Raises psycopg.Error."""
    ((exists,),) = connection.execute(
        "SELECT pg_catalog.to_regclass('analytics_touched') IS NOT NULL"
    ).fetchall()
    return rollups.touched(connection) if exists else None
