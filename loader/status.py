"""How it stands: what waits in the spool, what the ledger counts, what was rejected."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from loader import daemon, rejects
from loader.database import Connection
from spool.segment import OPEN, SEALED, STEM


@dataclass(frozen=True)
class Backlog:
    """What waits in a spool. `lag_seconds` is the age of the oldest sealed segment, 0 where there is none."""

    directory: str
    loader: str | None
    open_segments: int
    sealed_files: int
    sealed_bytes: int
    lag_seconds: float
    reject_files: int
    rejected: Mapping[str, int]


@dataclass(frozen=True)
class Ledger:
    """What was loaded so far, and rows per second over the last five minutes."""

    chunks: int
    lines: int
    events: int
    metrics: int
    duplicates: int
    rejected: int
    last_loaded_at: datetime | None
    rows_per_second: float


def backlog(spool: Path) -> Backlog:
    """Look at a spool, touching nothing. Raises OSError, ValueError (a damaged reject file)."""
    open_segments, sizes, oldest = 0, [], time.time()
    for path in spool.iterdir():
        if not STEM.fullmatch(path.stem):
            continue
        open_segments += path.suffix == OPEN
        if path.suffix == SEALED:
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # loaded meanwhile
            sizes.append(status.st_size)
            oldest = min(oldest, status.st_mtime)
    files = rejects.files(spool)
    return Backlog(
        directory=str(spool),
        loader=daemon.holder(spool),
        open_segments=open_segments,
        sealed_files=len(sizes),
        sealed_bytes=sum(sizes),
        lag_seconds=round(time.time() - oldest, 3) if sizes else 0.0,
        reject_files=len(files),
        rejected=dict(rejects.count(files).most_common()),
    )


def ledger(connection: Connection) -> Ledger:
    """Sum up the ledger. Raises psycopg.Error."""
    row = connection.execute(
        "SELECT count(*), coalesce(sum(lines), 0)::bigint, coalesce(sum(events), 0)::bigint, "
        "coalesce(sum(metrics), 0)::bigint, coalesce(sum(duplicates), 0)::bigint, "
        "coalesce(sum(rejected), 0)::bigint, max(loaded_at), coalesce(sum(events + metrics) "
        "FILTER (WHERE loaded_at > now() - interval '5 minutes'), 0)::float / 300 FROM analytics_loads"
    ).fetchone()
    assert row is not None  # an aggregate has one row
    return Ledger(*row)
