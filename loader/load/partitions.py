"""Creates the missing partitions of the partitioned layout, and inspects the existing ones.

A row is in the partition of the time in its UUIDv7, by default a UTC day. `analytics_make_partitions`
(schema.sql) creates partitions as the owner of the tables. Each call locks the tables that foreign keys
reference, so it creates one partition in its own transaction, and waits at most 100 ms for a lock: until
then, statements of the application queue behind it.
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

FIRST_DIVIDED: Final = "016f5e66-e800-0000-0000-000000000000"
FIRST_OTHER: Final = "02000000-0000-0000-0000-000000000000"
"""Ids from the first, of 2020, up to the second, of 2039, have a partition for each day (schema.sql). Most ids of
version 4 are beyond."""
RUNWAY_DAYS: Final = 14
"""Number of days ahead for which the daemon creates partitions."""
_PAUSE_SECONDS: Final = 0.5
"""Average pause between two attempts to get a lock: the application can proceed most of the time."""
_MAKE: Final = "SELECT analytics_make_partitions(%s::timestamptz, %s::timestamptz)"
_NOT_NOW: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.CheckViolation,  # a row was inserted into the default partition in the meantime
)


def id_at(moment: datetime) -> str:
    """Return the smallest UUIDv7 of a time, like `analytics_id_at` in schema.sql."""
    digits = f"{int(moment.timestamp() * 1000):012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


def time_of(key: str) -> datetime:
    """Return the time in a UUIDv7."""
    return datetime.fromtimestamp(int(key[:8] + key[9:13], 16) / 1000, UTC)


def make(
    connection: Connection, since: datetime | None = None, until: datetime | None = None,
    stopped: Callable[[], bool] = lambda: False, patience: float = 60.0,
) -> int:  # fmt: skip
    """Create the missing partitions from `since` to `until`, and return their number.

    Without a range, creates those for the next days, and for rows in the default partition. Does
    nothing in the plain layout. `patience` is in seconds; the connection must not be in a transaction. Raises
    psycopg.Error: LockNotAvailable if other sessions hold a lock for longer than that.
    """
    total, deadline = 0, time.monotonic() + patience
    while not stopped():
        try:
            with transaction(connection):
                ((made,),) = connection.execute(_MAKE, [since, until]).fetchall()
        except _NOT_NOW:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)  # the release of a lock is not reported
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
    """Creates the partitions of old rows before they are loaded, so that the rows need not be moved later."""

    def __init__(self, dsn: Callable[[], str]) -> None:
        self._dsn = dsn
        self._made: set[datetime] = set()
        self._is_partitioned: bool | None = None

    def prepare(self, lines: Iterable[bytes]) -> None:
        """Create partitions for the days of the ids in some lines.

        Does nothing in the plain layout. Failures are ignored: the rows are then loaded into the default
        partition.
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
    """Return the UTC days in UUIDs of version 7, without days that get no partition."""
    prefixes = {key[:8] for key in ids if key[_VERSION] == "7"}
    moments = (
        datetime.fromtimestamp((int(prefix, 16) << 16) / 1000, UTC)
        for prefix in prefixes
        if FIRST_DIVIDED[:8] <= prefix < FIRST_OTHER[:8]
    )
    days = {moment.replace(hour=0, minute=0, second=0, microsecond=0) for moment in moments}
    latest = datetime.now(UTC) + timedelta(days=_LATEST_DAYS)
    return {day for day in days if _FIRST <= day <= latest}


MOST_RANGES: Final = 8
"""Maximum number of key ranges in one statement. The planner checks each partition for each range."""
_GAP: Final = 24 * 60 * 60 * 1000 >> 16
"""Gap between keys, in units of 65.5 s, above which they are put into separate ranges: a day."""


def key_ranges(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Return at most MOST_RANGES ranges (lowest and highest key) that cover all given canonical UUIDs.

    With these bounds the planner only considers partitions that may contain the keys: 5 ms instead of 0.5 s
    with 999 partitions. Keys of late rows and of other versions get separate ranges.
    """
    lows: dict[str, str] = {}
    highs: dict[str, str] = {}
    for key in keys:
        prefix = min(key[:8], FIRST_OTHER[:8])
        if prefix not in lows:
            lows[prefix] = highs[prefix] = key
        elif key < lows[prefix]:
            lows[prefix] = key
        elif key > highs[prefix]:
            highs[prefix] = key
    ranges = [(lows[prefix], highs[prefix]) for prefix in sorted(lows)]
    return _joined(ranges)


def _joined(ranges: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return sorted ranges, joined except at the widest gaps between them."""
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
