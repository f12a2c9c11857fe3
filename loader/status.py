"""How it stands: what waits in the spool, what the ledger counts, what was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from loader import rejects
from loader.database import Connection
from loader.lock import holder
from loader.watch import Backlog, backlog


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
    lines: int
    events: int
    metrics: int
    duplicates: int
    rejected: int
    last_loaded_at: datetime | None
    rows_per_second: float


def spool(directory: Path) -> Spool:
    """Look at a spool, touching nothing. Raises LoaderError, OSError, ValueError (a damaged reject file)."""
    files = rejects.files(directory)
    return Spool(
        **asdict(backlog(directory)),
        directory=str(directory),
        loader=holder(directory),
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
