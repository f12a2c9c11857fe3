"""Helpers for lines, chunks and their outcome."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import orjson

from loader.files import rejects
from loader.files.chunk import Chunk, chunks
from loader.load.database import Connection
from tests.processes import eventually

STEM = "20260120T120000.000000Z-web-0a1b2c3d-42-deadbeef-{:06d}"
ID = "0190163d-8694-739b-aea5-966c26f8ad91"
EVENT: dict[str, Any] = {
    "event_id": ID, "event_type": "memory_posted", "timestamp": "2026-01-20T12:00:00.000001Z",
    "user_id": ID, "family_unit_id": ID, "session_id": None, "metadata": {"a": 1},
}  # fmt: skip
METRIC: dict[str, Any] = {
    "event_id": ID, "metric_name": "hits", "metric_type": "counter", "value": 1, "labels": {},
    "timestamp": "2026-01-20T12:00:00+01:00",
}  # fmt: skip


def event(number: int, **change: Any) -> bytes:
    return orjson.dumps(EVENT | {"event_id": f"0190163d-8694-739b-aea5-{number:012x}"} | change)


def metric(number: int, **change: Any) -> bytes:
    return orjson.dumps(METRIC | {"event_id": f"0190163d-8694-739b-beef-{number:012x}"} | change)


def joined(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def chunk(*lines: bytes, file: str = "s.ndjson") -> Chunk:
    (only,) = chunks(io.BytesIO(joined(*lines)), file)
    return only


def segment(spool: Path, number: int, *lines: bytes) -> Path:
    """Create a sealed segment with these lines."""
    path = spool / f"{STEM.format(number)}.ndjson"
    path.write_bytes(joined(*lines))
    return path


def as_owner(connection: Connection, statement: str) -> None:
    """Do and commit work that the loader's role may not do."""
    connection.execute("RESET ROLE")
    connection.execute(statement.encode())
    connection.execute("SET ROLE analytics_loader")
    connection.commit()


def rows(connection: Connection, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement, run in a separate transaction."""
    with connection.transaction():
        return connection.execute(statement.encode()).fetchall()


def number(connection: Connection, statement: str) -> int:
    ((value,),) = rows(connection, statement)
    return int(value or 0)


def is_number(connection: Connection, query: str, expected: int) -> bool:
    """Whether the query's number is the expected one."""
    return number(connection, query) == expected


def waits_for_events(connection: Connection) -> bool:
    """Whether a session waits for a lock on the events; can be called inside a transaction."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'analytics_events'::regclass"
    return number(connection, waiting) > 0


def wait_for_events(connection: Connection, count: int) -> None:
    """Wait until the table has at least the given number of events."""
    eventually(lambda: number(connection, "SELECT count(*) FROM analytics_events") >= count)


def rejected(spool: Path) -> list[tuple[str, int, str]]:
    """Return file, line and code of each reject."""
    return [(each.file, each.line, each.code) for path in rejects.files(spool) for each in rejects.read(path)]


def ledger_agrees(connection: Connection, spool: Path) -> None:
    """Whether the ledger's counts match the tables and the reject files, if nothing was retried."""
    counts = "SELECT coalesce(sum(events), 0), coalesce(sum(metrics), 0), coalesce(sum(rejected), 0) FROM {}"
    tables = "(SELECT count(*) FROM analytics_events), (SELECT count(*) FROM analytics_metrics)"
    ((events, metrics, refused),) = rows(connection, counts.format("analytics_loads"))
    assert [(events, metrics)] == rows(connection, f"SELECT {tables}")
    assert refused == len(rejected(spool))
