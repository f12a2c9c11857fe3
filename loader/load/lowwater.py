"""Low-water marks: a table's rows below its mark were pruned, so that a line below it cannot be compared with its row.

`loader prune` raises a mark in the transaction that deletes. A load reads the marks when it begins, counts the
lines below them as expired, and reads the marks again before it commits: a row that it inserted in the place of
one that was deleted in the meantime would be counted twice.

A line's moment is that of its id if the tables are partitioned, because partitions follow ids, and if the id has
one (UUIDv7); otherwise its timestamp.
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
"""Rows of `analytics_settings`; absent until something was pruned."""
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
"""Of a UUID's text: the digit of its version."""
_exist: WeakKeyDictionary[Connection, bool] = WeakKeyDictionary()
"""Connections to tables that have marks. Tables are upgraded, never the reverse."""


@dataclass(frozen=True)
class Mark:
    """The moment below which the rows of a table were pruned."""

    moment: datetime
    partitioned: bool

    @cached_property
    def hour(self) -> str:
        """As `Row.hour`: text, because a load compares each of its rows."""
        return self.moment.astimezone(UTC).replace(tzinfo=None).isoformat()[:_HOUR]

    @cached_property
    def first_id(self) -> str:
        """The beginning of the smallest UUIDv7 of the moment: its milliseconds."""
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
    """Return whether the tables have marks, and merged rows in their ledger: from version 5. Raises psycopg.Error."""
    if not _exist.get(connection):
        ((_exist[connection],),) = connection.execute(_EXIST).fetchall()
    return _exist[connection]


def read(connection: Connection) -> Marks:
    """Return the marks there are. Raises psycopg.Error."""
    if not exist(connection):
        return NONE
    found = {name: (value, partitioned) for name, value, partitioned in connection.execute(_READ)}
    return {
        table: Mark(datetime.fromisoformat(found[name][0]), partitioned=found[name][1])
        for table, name in SETTINGS.items()
        if name in found
    }


def check_unchanged(connection: Connection, before: Marks) -> None:
    """Raise SerializationFailure, after which the batch is loaded again, if a mark was raised. Raises psycopg.Error."""
    if read(connection) != before:
        raise psycopg.errors.SerializationFailure("rows were pruned in the meantime: try again")
