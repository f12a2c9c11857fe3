"""Low-water marks. The rows of a table below its mark were pruned, so a line below it cannot be checked for duplicates.

`loader prune` raises a mark in the transaction that deletes rows. A load reads the marks when it begins, counts the
lines below them as expired, and reads the marks again before it commits: if it inserted a row that was deleted in
the meantime, the rollups would count the row twice.

The time of a line is the time in its id if the tables are partitioned (partitions are by id) and the id is a
UUIDv7; otherwise it is its timestamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Final
from weakref import WeakKeyDictionary

import psycopg

from loader.load.database import Connection
from loader.load.decode import Row
from loader.load.tables import EVENTS, METRICS, Table

SETTINGS: Final = {EVENTS: "events_kept_since", METRICS: "metrics_kept_since"}
"""Rows of `analytics_settings`; absent until the first prune."""
_EXIST: Final = (
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attname = 'expired' "
    "AND attrelid = pg_catalog.to_regclass('analytics_loads')::oid)"
)
_READ: Final = (
    "SELECT name, value, EXISTS (SELECT FROM pg_catalog.pg_class WHERE relkind = 'p' "
    "AND oid = pg_catalog.to_regclass('analytics_events')::oid) "
    "FROM analytics_settings WHERE name IN ('events_kept_since', 'metrics_kept_since')"
)
_HOUR: Final = len("2026-11-25T03")
_VERSION_AT: Final = 14
"""Position of the version digit in a UUID's text."""
_exist: WeakKeyDictionary[Connection, bool] = WeakKeyDictionary()
"""Connections to tables that have marks. The answer is cached because tables are never downgraded."""


@dataclass(frozen=True)
class Mark:
    """The time before which the rows of a table were pruned."""

    moment: datetime
    partitioned: bool

    @cached_property
    def hour(self) -> str:
        """The mark in the format of `Row.hour`: text, because it is compared with every row of a load."""
        return self.moment.astimezone(UTC).replace(tzinfo=None).isoformat()[:_HOUR]

    @cached_property
    def first_id(self) -> str:
        """The first digits of the smallest UUIDv7 of that time: its milliseconds."""
        milliseconds = f"{max(0, int(self.moment.timestamp() * 1000)):012x}"
        return f"{milliseconds[:8]}-{milliseconds[8:]}"

    def expires(self, row: Row) -> bool:
        """Return whether a row lies below the mark."""
        if self.partitioned and row.event_id[_VERSION_AT] == "7":
            return row.event_id < self.first_id
        return row.hour[:_HOUR] < self.hour


Marks = Mapping[Table, Mark]
NONE: Final[Marks] = {}


def exist(connection: Connection) -> bool:
    """Return whether the tables support marks and merged ledger rows: from version 5. Raises psycopg.Error."""
    if not _exist.get(connection):
        ((_exist[connection],),) = connection.execute(_EXIST).fetchall()
    return _exist[connection]


def read(connection: Connection) -> Marks:
    """Return the existing marks. Raises psycopg.Error."""
    if not exist(connection):
        return NONE
    found = {name: (value, partitioned) for name, value, partitioned in connection.execute(_READ)}
    return {
        table: Mark(datetime.fromisoformat(found[name][0]), partitioned=found[name][1])
        for table, name in SETTINGS.items()
        if name in found
    }


def check_unchanged(connection: Connection, before: Marks) -> None:
    """Raise SerializationFailure if a mark was raised, so that the batch is loaded again. Raises psycopg.Error."""
    if read(connection) != before:
        raise psycopg.errors.SerializationFailure("rows were pruned in the meantime: try again")
