"""Rollups of the tables: computing the hours that loads touched, and their state.

A reader always gets exact answers (schema.sql, "questions"); a refresh makes them cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from loader.load.database import Connection, transaction

SLICE_HOURS: Final = 168
"""Hours that one transaction computes: some seconds of a server's work at 10 events a second."""
_TOUCHED: Final = (
    "SELECT count(DISTINCT hour) FILTER (WHERE isfinite(hour)), min(hour) FILTER (WHERE isfinite(hour)), "
    "coalesce(bool_or(NOT isfinite(hour)), false), now() - min(hour) FILTER (WHERE isfinite(hour)) "
    "FROM analytics_touched WHERE source <> 'users'"
)


@dataclass(frozen=True)
class Touched:
    """Hours that readers take from rows: how many, the oldest, and how long ago it began.

    `unbuilt` means that no rollup was computed since the tables were upgraded.
    """

    hours: int
    oldest: datetime | None
    unbuilt: bool
    age: timedelta | None


def touched(connection: Connection) -> Touched:
    """Return which hours are touched. Raises psycopg.Error."""
    (row,) = connection.execute(_TOUCHED).fetchall()
    return Touched(*row)


def refresh(connection: Connection, stopped: Callable[[], bool] = lambda: False) -> int:
    """Compute the hours and days that are touched and have ended, in transactions of some of them each.

    Returns how many; 0 also while another refresh runs. The connection must be in no transaction. Raises
    psycopg.Error; psycopg.errors.SerializationFailure if another refresh was faster: try again.
    """
    total, done = 0, 1
    while done and not stopped():
        done = _in_one_snapshot(connection, f"SELECT analytics_refresh({SLICE_HOURS})")
        total += done
    return total


def rebuild(connection: Connection) -> int:
    """Mark every hour, so that `refresh` computes all rollups again, and return how many; pruned hours stay.

    Raises psycopg.Error.
    """
    return _in_one_snapshot(connection, "SELECT analytics_rebuild()")


def _in_one_snapshot(connection: Connection, statement: str) -> int:
    with transaction(connection, "REPEATABLE READ"):
        ((value,),) = connection.execute(statement.encode()).fetchall()
    return int(value)
