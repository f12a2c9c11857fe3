"""The status of a spool and a ledger: what waits, what was loaded, what was rejected."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from loader.files import rejects
from loader.files.lock import holder
from loader.files.scan import Backlog, backlog
from loader.load.counts import Counts
from loader.load.database import Connection


@dataclass(frozen=True)
class Spool(Backlog):
    """A spool: what waits there, who loads it, what was rejected."""

    directory: str
    loader: str | None
    reject_files: int
    rejected: Mapping[str, int]


@dataclass(frozen=True)
class Ledger:
    """What was loaded so far, and rows per second over the last five minutes."""

    chunks: int
    counts: Counts
    last_loaded_at: datetime | None
    rows_per_second: float

    def facts(self) -> dict[str, object]:
        """Return the values by the names that `loader status` prints."""
        return {
            "chunks": self.chunks, "lines": self.counts.lines, **asdict(self.counts),
            "last_loaded_at": self.last_loaded_at, "rows_per_second": self.rows_per_second,
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
    row = connection.execute(
        "SELECT count(*), coalesce(sum(events), 0)::bigint, "
        "coalesce(sum(metrics), 0)::bigint, coalesce(sum(duplicates), 0)::bigint, "
        "coalesce(sum(rejected), 0)::bigint, max(loaded_at), coalesce(sum(events + metrics) "
        "FILTER (WHERE loaded_at > now() - interval '5 minutes'), 0)::float / 300 FROM analytics_loads"
    ).fetchone()
    assert row is not None  # an aggregate has one row
    chunks, *counts, last_loaded_at, rows_per_second = row
    return Ledger(chunks, Counts(*counts), last_loaded_at, rows_per_second)
