"""The status of a spool and a ledger: what waits, what was loaded, what was rejected."""

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
from loader.load.database import Connection
from loader.load.dropped import dropped, unreported

_RATE_MINUTES: Final = 5


@dataclass(frozen=True)
class Spool(Backlog):
    """A spool: what waits there, who loads it, what was rejected."""

    directory: str
    loader: str | None
    reject_files: int
    rejected: Mapping[str, int]
    waiting_for_parents: int
    """Rejects of the last hour for a parent that does not exist, which the daemon retries."""
    unreported_drops: Mapping[str, int]
    """Lines that emitters dropped and no metric reports yet."""


@dataclass(frozen=True)
class Ledger:
    """What was loaded so far, and rows per second over the last five minutes."""

    chunks: int
    counts: Counts
    retried: int
    """Lines that were rejected at first; `counts` has them twice."""
    last_loaded_at: datetime | None
    rows_per_second: float
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Lines that emitters dropped, by cause and event type or metric name, as their metrics report."""

    def facts(self) -> dict[str, object]:
        """Return the values by the names that `loader status` prints."""
        return {
            "chunks": self.chunks, "lines": self.counts.lines, **asdict(self.counts), "retried": self.retried,
            "last_loaded_at": self.last_loaded_at, "rows_per_second": self.rows_per_second,
            "dropped": self.dropped,
        }  # fmt: skip


def spool(directory: Path) -> Spool:
    """Look at a spool, touching nothing. Raises LoaderError, OSError, ValueError (a damaged reject file)."""
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

    A file that a loader removes between the listing and the reading is left out. Raises as `spool`.
    """
    for path in rejects.files(directory):
        with contextlib.suppress(FileNotFoundError):
            yield path, rejects.count([path])


def ledger(connection: Connection) -> Ledger:
    """Sum up the ledger. Raises psycopg.Error."""
    # Of a merged row and of lines that expired: tables of an earlier version have neither.
    segments, expired = ("segments", "expired") if lowwater.exist(connection) else ("1", "0")
    row = connection.execute(
        f"SELECT coalesce(pg_catalog.sum({segments}), 0)::bigint, coalesce(pg_catalog.sum(events), 0)::bigint, "
        "coalesce(pg_catalog.sum(metrics), 0)::bigint, coalesce(pg_catalog.sum(duplicates), 0)::bigint, "
        f"coalesce(pg_catalog.sum(rejected), 0)::bigint, coalesce(pg_catalog.sum({expired}), 0)::bigint, "
        "pg_catalog.max(loaded_at), "
        "coalesce(pg_catalog.sum(events + metrics) FILTER "
        "(WHERE loaded_at > pg_catalog.now() - pg_catalog.make_interval(mins => %s::int)), 0)::float, "
        "coalesce(pg_catalog.sum(lines) FILTER (WHERE pg_catalog.starts_with(file, %s)), 0)::bigint "
        "FROM analytics_loads",
        [_RATE_MINUTES, f"{rejects.DIRECTORY}/"],
    ).fetchone()
    assert row is not None  # an aggregate has one row
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
    """Return the touched hours of the rollups; None for tables of a version without. Raises psycopg.Error."""
    ((exists,),) = connection.execute(
        "SELECT pg_catalog.to_regclass('analytics_touched') IS NOT NULL"
    ).fetchall()
    return rollups.touched(connection) if exists else None
