"""Partitions of the tables, in the partitioned layout: makes the missing ones, and reports on those that exist.

A row lies in the partition of the time in its UUIDv7, a day of UTC unless another width was chosen.
`analytics_make_partitions` (schema.sql) makes them as the owner of the tables. Each call locks the tables that
foreign keys refer to, so it makes one partition, in a transaction of its own, and waits 100 ms for a lock at
most: in the meantime, statements of the application would queue behind it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import psycopg

from loader.load.database import Connection, connect, transaction

RUNWAY_DAYS: Final = 14
"""Days ahead for which the daemon makes partitions."""
_PAUSE_SECONDS: Final = 0.5
"""Between two attempts to get a lock, on average: the application has its turn for most of the time."""
_MAKE: Final = "SELECT analytics_make_partitions(%s::timestamptz, %s::timestamptz)"
_NOT_NOW: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.CheckViolation,  # a row came to the default partition in the meantime
)


def make(
    connection: Connection, since: datetime | None = None, until: datetime | None = None,
    stopped: Callable[[], bool] = lambda: False, patience: float = 60.0,
) -> int:  # fmt: skip
    """Make the partitions that are missing from `since` to `until`, and return how many were made.

    Without a range: those of the coming days, and of rows that wait in the default partition. Does nothing in
    the plain layout. `patience` is in seconds; the connection must be in no transaction. Raises psycopg.Error:
    LockNotAvailable if other sessions hold a lock for longer than that.
    """
    total, deadline = 0, time.monotonic() + patience
    while not stopped():
        try:
            with transaction(connection):
                ((made,),) = connection.execute(_MAKE, [since, until]).fetchall()
        except _NOT_NOW:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)  # nothing reports that a lock is free
            continue
        if not made:
            break
        total += made
    return total


_IS_PARTITIONED: Final = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind = 'p' "
    "AND oid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid) AND pg_catalog.to_regproc("
    "'analytics_make_partitions') IS NOT NULL"
)


def is_partitioned(connection: Connection) -> bool:
    """Whether the tables have the partitioned layout of schema.sql. Raises psycopg.Error."""
    return connection.execute(_IS_PARTITIONED).fetchone() == (True,)


_ID: Final = re.compile(rb'"(?:event_)?id"\s*:\s*"([0-9A-Fa-f-]{36})"')


class Ahead:
    """Makes the partitions of old rows before they are loaded, so that they need not be moved there."""

    def __init__(self, dsn: Callable[[], str]) -> None:
        self._dsn = dsn
        self._made: set[datetime] = set()
        self._is_partitioned: bool | None = None

    def prepare(self, lines: Iterable[bytes]) -> None:
        """Make partitions for the days of the ids in some lines.

        Does nothing in the plain layout. A failure is left to the load: the rows go to the default partition.
        """
        if self._is_partitioned is False:
            return
        ids = (found[1].decode().lower() for line in lines if (found := _ID.search(line)))
        if days := days_of(ids) - self._made:
            with contextlib.suppress(psycopg.Error), connect(self._dsn()) as connection:
                with transaction(connection):
                    self._is_partitioned = is_partitioned(connection)
                for day in sorted(days) if self._is_partitioned else ():
                    make(connection, day, day + timedelta(days=1))
                    self._made.add(day)


_LATEST_DAYS: Final = 1
_FIRST: Final = datetime(2020, 1, 1, tzinfo=UTC)
_VERSION: Final = 14
"""Position of the version in a UUID's text."""


def days_of(ids: Iterable[str]) -> set[datetime]:
    """Return the days of UTC at which UUIDs of version 7 were made, without those that get no partition."""
    prefixes = {key[:8] for key in ids if key[_VERSION] == "7"}
    moments = (
        datetime.fromtimestamp((int(prefix, 16) << 16) / 1000, UTC)
        for prefix in prefixes
        if _BOUNDS[0] <= prefix < _BOUNDS[1]
    )
    days = {moment.replace(hour=0, minute=0, second=0, microsecond=0) for moment in moments}
    latest = datetime.now(UTC) + timedelta(days=_LATEST_DAYS)
    return {day for day in days if _FIRST <= day <= latest}


_BOUNDS: Final = ("016f5e66", "02000000")
"""The first eight digits of an id of 2020, and of one of 2039: what lies before and after is not divided by days."""

MOST_RANGES: Final = 8
"""Ranges of keys in one statement. The planner looks at each partition for each range."""
_GAP: Final = 24 * 60 * 60 * 1000 >> 16
"""Between two keys, in units of 65.5 s, from which on they are in two ranges: a day."""


def key_ranges(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return at most MOST_RANGES ranges, lowest and highest key, that hold all of some canonical UUIDs.

    A statement with these bounds is planned for the partitions that may hold the keys, not for all: with 999
    partitions that is 5 ms instead of 0.5 s. Keys of late rows and of other versions get ranges of their own.
    """
    lows: dict[str, str] = {}
    highs: dict[str, str] = {}
    for key in keys:
        prefix = min(key[:8], _BOUNDS[1])
        if prefix not in lows:
            lows[prefix] = highs[prefix] = key
        elif key < lows[prefix]:
            lows[prefix] = key
        elif key > highs[prefix]:
            highs[prefix] = key
    ranges = [(lows[prefix], highs[prefix]) for prefix in sorted(lows)]
    return _joined(ranges)


def _joined(ranges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return ranges in order with all but the widest gaps between them closed."""
    gaps = [int(after[0][:8], 16) - int(before[1][:8], 16) for before, after in itertools.pairwise(ranges)]
    widest = sorted((gap for gap in gaps if gap > _GAP), reverse=True)[: MOST_RANGES - 1]
    least = widest[-1] if widest else None
    joined = ranges[:1]
    for gap, following in zip(gaps, ranges[1:], strict=False):
        if least is not None and gap >= least and len(joined) < MOST_RANGES:
            joined.append(following)
        else:
            joined[-1] = (joined[-1][0], following[1])
    return joined
