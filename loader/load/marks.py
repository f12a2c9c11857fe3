"""Marks touched hours in `analytics_touched`: a load appends a mark for each UTC hour that got new rows.

Marks are written in the transaction of the rows, so that a rollup never misses a row: if a row is visible, so
is its mark. Earlier schema versions have neither this table nor rollups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loader.load.database import Connection
from loader.load.outcome import Outcome

_EXISTS: Final = "SELECT pg_catalog.to_regclass('analytics_touched') IS NOT NULL"
_RECORD: Final = (
    "INSERT INTO analytics_touched (hour, source) "
    "SELECT DISTINCT pg_catalog.date_trunc('hour', moment, 'UTC'), source FROM ROWS FROM ("
    "pg_catalog.unnest(%s::timestamptz[]), pg_catalog.unnest(%s::text[])) AS touched (moment, source)"
)
_HOUR: Final = len("2026-11-25T03")


def record(connection: Connection, outcomes: Iterable[Outcome]) -> None:
    """Mark the hours of the inserted rows. Raises psycopg.Error."""
    marks = {(_moment(hour), "events") for outcome in outcomes for hour in outcome.event_hours}
    marks |= {(_moment(hour), "metrics") for outcome in outcomes for hour in outcome.metric_hours}
    if not marks:
        return
    ((exists,),) = connection.execute(_EXISTS).fetchall()
    if exists:
        moments, sources = zip(*sorted(marks), strict=True)
        connection.execute(_RECORD, [list(moments), list(sources)])


def _moment(hour: str) -> str:
    return f"{hour}:00Z" if len(hour) == _HOUR else hour
