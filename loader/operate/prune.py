"""Deletes data older than the retention time: rows, ledger rows, rejected and archived files.

Rows are deleted by the server's clock. Their counts remain in the rollups, which are refreshed first. Partitions
with old ids are dropped, oldest first, each in a transaction (schema.sql, analytics_drop_partition). Other rows
are deleted by the hour of their `timestamp` in batches, each a transaction that takes no lock needed by a load
(analytics_prune_hour). The transaction that deletes rows raises the low-water mark of their table: older lines
are not loaded again. A transaction is repeated after a deadlock or a lock timeout.

The age of ledger rows is the time since their load; the rows of one writer are deleted together, once the last
one is old, because the view of missing segments counts from 1. The remaining rows are merged
(analytics_merge_loads). The age of files is that of their modification time.

Operators are qualified, because for `varchar` an operator of another schema may match better (see schema.sql).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, LiteralString, cast

import psycopg
from psycopg import sql

from loader.errors import LoaderError
from loader.files import nofollow, rejects
from loader.files.retire import SUFFIX
from loader.load import ledger, lowwater, rollups
from loader.load.database import Connection, is_distributed, transaction
from loader.load.tables import EVENTS, METRICS, Table
from spool.segment import SEALED

BATCH_ROWS: Final = 5000
"""Rows per batch: a few tenths of a second of server time."""
_DAY: Final = re.compile(r"[0-9]{8}")

_KINDS: Final = (
    "WITH RECURSIVE kinds AS ((SELECT {kind} AS kind FROM {table} ORDER BY 1 LIMIT 1) UNION ALL "
    "SELECT (SELECT {kind} FROM {table} WHERE {kind} OPERATOR(pg_catalog.>) kinds.kind ORDER BY 1 LIMIT 1) "
    "FROM kinds "
    "WHERE kind IS NOT NULL) SELECT kind FROM kinds WHERE kind IS NOT NULL"
)
"""The existing kinds, by a loose index scan."""
_KINDS_DISTRIBUTED: Final = "SELECT DISTINCT {kind} FROM {table}"
"""Citus allows no recursion over a distributed table."""
_COUNT: Final = (
    "SELECT pg_catalog.count(*) FROM {table} WHERE {kind} OPERATOR(pg_catalog.=) %s AND timestamp < %s"
)
_COUNT_UNTIMED: Final = (
    _COUNT + " AND (NOT analytics_has_time({key}) OR {key} < analytics_id_at(%s::timestamptz))"
)
_NAME: Final = "SELECT pg_catalog.to_regclass('{table}')::text"
_COUNT_ALL: Final = "SELECT pg_catalog.count(*) FROM {table}"
_PARTITIONS: Final = (
    "SELECT child::text, since, until FROM analytics_time_partitions(%s::text) "
    "WHERE until <= %s::timestamptz ORDER BY until"
)
_UNTIMED: Final = "SELECT child::text FROM analytics_untimed(%s::text) AS child"
_CUTOFF: Final = (
    "SELECT least(%s::timestamptz, pg_catalog.min(since)) FROM analytics_time_partitions(%s::text) "
    "WHERE until > %s::timestamptz"
)
"""The time before which rows are deleted. It does not exceed the lower bound of the remaining partitions by time."""
_DROP: Final = (
    "SELECT rows, newer FROM analytics_drop_partition(%s::text, %s::regclass, %s::timestamptz, %s::bigint)"
)
_HOURS: Final = "SELECT hour FROM analytics_prunable(%s::text, %s::timestamptz) AS hour"
_PRUNE_HOUR: Final = "SELECT analytics_prune_hour(%s::text, %s::timestamptz, %s::int4)"
_WRITERS: Final = "SELECT DISTINCT writer FROM analytics_loads WHERE loaded_at >= %s AND writer IS NOT NULL"
_OLD_LOADS: Final = "analytics_loads WHERE coalesce(writer, '') <> ALL(%s::text[]) AND loaded_at < %s"
_COUNT_LOADS: Final = f"SELECT pg_catalog.count(*) FROM {_OLD_LOADS}"
_DELETE_LOADS: Final = (
    f"WITH old AS MATERIALIZED (SELECT digest AS key FROM {_OLD_LOADS} "
    "AND loaded_at >= %s::timestamptz ORDER BY loaded_at LIMIT %s), gone AS "
    "(DELETE FROM analytics_loads USING old WHERE digest = old.key RETURNING loaded_at) "
    "SELECT pg_catalog.count(*), pg_catalog.max(loaded_at)::text FROM gone"
)
"""A batch starts at the end of the previous one, to skip the index entries of deleted rows."""

_DELETE_STATEMENTS: Final = (
    "DELETE FROM analytics_writers AS each WHERE reported_at < %s AND (writer <> ALL(%s::text[]) OR EXISTS "
    "(SELECT FROM analytics_writers AS later WHERE later.writer = each.writer "
    "AND later.reported_at > each.reported_at)) RETURNING 1"
)
"""Keeps the last account of a running writer, like its ledger rows."""


SourceName = Literal["events", "metrics"]
Export = Callable[[Connection, SourceName, str], int]
"""Writes the named partition to a file and returns the number of rows. Raises OSError, LoaderError, psycopg.Error."""

_SOURCES: Final[Mapping[Table, SourceName]] = {EVENTS: "events", METRICS: "metrics"}
_LOCK_SECONDS: Final = 5
_PATIENCE: Final = 60.0
"""Seconds for which a batch is repeated while other sessions block it."""
_REPEATED: Final = ("40001", "40P01", "55P03", "57014")
"""serialization_failure, deadlock_detected, lock_not_available, query_canceled (by a timeout)."""


@dataclass(frozen=True)
class Ages:
    """The retention time of each table, of ledger rows and of files. None keeps them."""

    events: timedelta | None = None
    metrics: timedelta | None = None
    loads: timedelta | None = None
    files: timedelta | None = None

    @classmethod
    def of_all(cls, age: timedelta) -> Ages:
        """Return one age for everything."""
        return cls(age, age, age, age)


@dataclass(frozen=True)
class Partition:
    """A partition of the ids in `since <= time < until`. The former plain table has no `since`."""

    name: str
    since: datetime | None
    until: datetime


@dataclass(frozen=True)
class Dropped:
    """The number of rows of a dropped partition, and how many of them had a timestamp that is not old."""

    rows: int
    newer: int


@dataclass
class Pruned:
    """The number of old or deleted items: rows by table, `loads` of the ledger, files.

    `dropped` has the partitions among the rows. `skipped` maps each archive entry that is not a day's directory
    to the reason for skipping it, and `failures` maps what could not be deleted.
    """

    events: int = 0
    metrics: int = 0
    loads: int = 0
    rejected_files: int = 0
    archived_files: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the counts by the names that `loader prune` prints."""
        return {
            "events": self.events, "metrics": self.metrics, "loads": self.loads,
            "rejected_files": self.rejected_files, "archived_files": self.archived_files,
        }  # fmt: skip


class Rows:
    """The rows older than their retention time, by the server's clock. Methods raise psycopg.Error.

    Only whole hours of the tables are deleted: rows of the hour in which an age ends are kept until it has passed.
    """

    def __init__(
        self, connection: Connection, ages: Ages | timedelta, stop: threading.Event,
        export: Export | None = None,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._stop = stop
        self._ages = ages if isinstance(ages, Ages) else Ages.of_all(ages)
        self._export = export
        ((self._now,),) = self._run("SELECT pg_catalog.now()", EVENTS)
        self._hours = {
            table: self._before_hour(age)
            for table, age in ((EVENTS, self._ages.events), (METRICS, self._ages.metrics))
            if age is not None
        }

    @property
    def limits(self) -> dict[str, datetime | None]:
        """Return the time before which each kind of data is old."""
        return {name: age and self._now - age for name, age in vars(self._ages).items()}

    @property
    def before(self) -> datetime:
        """The latest of the limits."""
        return max(limit for limit in self.limits.values() if limit is not None)

    def count(self) -> Pruned:
        pruned = Pruned()
        for table, source in _SOURCES.items():
            if table in self._hours:
                setattr(pruned, source, self._count_rows(table, source, pruned.dropped))
        if (limit := self.limits["loads"]) is not None:
            pruned.loads = self._number(_COUNT_LOADS, EVENTS, self._writers(limit), limit)
        return pruned

    def delete(self, deleted: Callable[[int], None]) -> Pruned:
        """Delete the rows until done or stopped; `deleted` is called with the number of rows of each committed batch.

        Raises LoaderError if the tables are of a version without marks, and the errors of an export.
        """
        rollups.refresh_patiently(self._connection, self._stop.is_set, _PATIENCE)
        if not self._has_marks():
            raise LoaderError("the tables have no low-water marks: run `loader init` as their owner")
        if self._export and is_distributed(self._connection):
            raise LoaderError(
                "cannot export what is pruned on Citus, where no partition is dropped: run `loader export` before, "
                "and prune without --export"
            )
        pruned = Pruned()
        for table, source in _SOURCES.items():
            if table in self._hours:
                dropped = self._drop_partitions(table, source, deleted, pruned.dropped)
                setattr(pruned, source, dropped + self._delete_rows(table, source, deleted))
        if (limit := self.limits["loads"]) is not None:
            # Before the ledger's rows: a statement without its ledger rows would report lines as missing.
            self._delete_statements(self._writers(limit), limit)
            pruned.loads = self._delete_loads(deleted, limit)
        ledger.merge(self._connection, self._stop.is_set)
        return pruned

    def _has_marks(self) -> bool:
        with transaction(self._connection):
            return lowwater.exist(self._connection)

    def _before_hour(self, age: timedelta) -> datetime:
        statement = "SELECT pg_catalog.date_trunc('hour', %s::timestamptz, 'UTC')"
        ((hour,),) = self._run(statement, EVENTS, self._now - age)
        return cast(datetime, hour)

    def _partitions(self, table: Table, source: SourceName) -> list[Partition]:
        """Return the old partitions, oldest first."""
        return [Partition(*found) for found in self._run(_PARTITIONS, table, source, self._hours[table])]

    def _cutoff(self, table: Table, source: SourceName) -> datetime:
        before = self._hours[table]
        ((cutoff,),) = self._run(_CUTOFF, table, before, source, before)
        return cast(datetime, cutoff)

    def _count_rows(self, table: Table, source: SourceName, dropped: dict[str, Dropped]) -> int:
        before = self._hours[table]
        if not self._has_marks():  # an earlier version, which cannot have partitions to drop
            return sum(self._number(_COUNT, table, kind, before) for kind in self._kinds(table))
        old, total = self._partitions(table, source), 0
        for partition in old:
            count = self._number(_COUNT_ALL, table, name=partition.name)
            newer = self._number(_COUNT_ALL + " WHERE timestamp >= %s", table, before, name=partition.name)
            dropped[partition.name] = Dropped(count, newer)
            total += count
        cutoff, parent = self._cutoff(table, source), self._run(_NAME, table)
        for (child,) in self._run(_UNTIMED, table, source):
            if child in dropped:
                continue
            is_plain = [(child,)] == parent and not is_distributed(self._connection)
            values = (cutoff,) if is_plain else (cutoff, cutoff)
            statement = _COUNT if is_plain else _COUNT_UNTIMED
            total += sum(
                self._number(statement, table, kind, *values, name=child)
                for kind in self._kinds(table, child)
            )
        return total

    def _drop_partitions(
        self, table: Table, source: SourceName, deleted: Callable[[int], None], dropped: dict[str, Dropped]
    ) -> int:
        total = 0
        for partition in self._partitions(table, source):
            if self._stop.is_set():
                break
            dropped[partition.name] = self._drop(table, source, partition)
            total += dropped[partition.name].rows
            deleted(dropped[partition.name].rows)
        return total

    def _drop(self, table: Table, source: SourceName, partition: Partition) -> Dropped:
        """Export a partition, then drop it, unless a row was added in between: then repeat both."""

        def drop() -> list[tuple[Any, ...]]:
            expected = self._export and self._export(self._connection, source, partition.name)
            with transaction(self._connection):
                values = (source, partition.name, self._hours[table], expected)
                return self._connection.execute(_DROP.encode(), values).fetchall()

        ((rows, newer),) = self._patiently(drop)
        return Dropped(rows, newer)

    def _delete_statements(self, writers: list[str], limit: datetime) -> None:
        """Delete old statements, including the last one of a writer whose ledger rows are all old."""
        if self._run("SELECT pg_catalog.to_regclass('analytics_writers') IS NOT NULL", EVENTS) == [(True,)]:
            self._run(_DELETE_STATEMENTS, EVENTS, limit, writers)

    def _delete_rows(self, table: Table, source: SourceName, deleted: Callable[[int], None]) -> int:
        total = 0
        hours = self._run(_HOURS, EVENTS, source, self._cutoff(table, source))
        if is_distributed(self._connection):
            hours.reverse()  # the mark is raised to the last hour at once: what has a newer id would stay
        for (hour,) in hours:
            count = BATCH_ROWS
            while count >= BATCH_ROWS and not self._stop.is_set():
                count = self._number(_PRUNE_HOUR, EVENTS, source, hour, BATCH_ROWS)
                total += count
                deleted(count)
        return total

    def _delete_loads(self, deleted: Callable[[int], None], limit: datetime) -> int:
        total, count, since, writers = 0, BATCH_ROWS, "-infinity", self._writers(limit)
        while count == BATCH_ROWS and not self._stop.is_set():
            ((count, last),) = self._run(_DELETE_LOADS, EVENTS, writers, limit, since, BATCH_ROWS)
            since = last or since
            total += count
            deleted(count)
        return total

    def _kinds(self, table: Table, name: str | None = None) -> list[str]:
        statement: LiteralString = _KINDS_DISTRIBUTED if is_distributed(self._connection) else _KINDS
        return [kind for (kind,) in self._run(statement, table, name=name)]

    def _writers(self, limit: datetime) -> list[str]:
        """Return the writers with a segment loaded since `limit`."""
        return [writer for (writer,) in self._run(_WRITERS, EVENTS, limit)]

    def _number(
        self, statement: LiteralString, table: Table, *values: object, name: str | None = None
    ) -> int:
        ((number,),) = self._run(statement, table, *values, name=name)
        return int(number)

    def _run(
        self, statement: LiteralString, table: Table, *values: object, name: str | None = None
    ) -> list[tuple[Any, ...]]:
        """Run a statement in its own transaction; `name` is the name of a partition, quoted as in the catalog."""
        text = sql.SQL(statement).format(
            table=sql.Identifier(table.name) if name is None else sql.SQL(name),
            kind=sql.Identifier(table.kind), key=sql.Identifier(table.key),
        )  # fmt: skip

        def run() -> list[tuple[Any, ...]]:
            with transaction(self._connection):
                self._connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'".encode())
                return self._connection.execute(text, values).fetchall()

        return self._patiently(run)

    def _patiently(self, run: Callable[[], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        """Run a transaction, and repeat it if other sessions blocked it."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return run()
            except psycopg.Error as error:
                if error.sqlstate not in _REPEATED or time.monotonic() > deadline or self._stop.is_set():
                    raise
            self._stop.wait(random.uniform(0.1, 0.5))


def files(spool: Path, archive: Path | None, before: datetime, *, dry_run: bool) -> Pruned:
    """Delete, or only count, the rejected and archived files older than `before`."""
    pruned = Pruned()
    if not dry_run:
        with _noting_failures(pruned, rejects.DIRECTORY):
            rejects.remove_leftovers(spool)
    with _noting_failures(pruned, rejects.DIRECTORY), nofollow.opened(spool / rejects.DIRECTORY) as rejected:
        pruned.rejected_files = _remove(rejected, (SEALED, rejects.WHOLE), before, pruned, dry_run)
    if archive is not None:
        with _noting_failures(pruned, str(archive)), nofollow.opened(archive) as base:
            for name in filter(_DAY.fullmatch, os.listdir(base)):
                with _noting_failures(pruned, name):
                    pruned.archived_files += _day(base, name, before, pruned, dry_run)
    return pruned


def _day(base: int, name: str, before: datetime, pruned: Pruned, dry_run: bool) -> int:
    """Prune a day's directory of the archive; return the number of old files."""
    if stat.S_ISREG(os.stat(name, dir_fd=base, follow_symlinks=False).st_mode):
        pruned.skipped[name] = "is a file, not a day's directory"
        return 0
    with nofollow.opened(name, base) as day:
        count = _remove(day, (SEALED + SUFFIX,), before, pruned, dry_run)
    if not dry_run:
        with contextlib.suppress(OSError):  # it contains other files
            os.rmdir(name, dir_fd=base)
    return count


def _remove(where: int, suffixes: tuple[str, ...], before: datetime, pruned: Pruned, dry_run: bool) -> int:
    count = 0
    for name in nofollow.names(where, suffixes):
        with _noting_failures(pruned, name):
            if os.stat(name, dir_fd=where, follow_symlinks=False).st_mtime < before.timestamp():
                if not dry_run:
                    os.unlink(name, dir_fd=where)
                count += 1
    return count


@contextlib.contextmanager
def _noting_failures(pruned: Pruned, name: str) -> Iterator[None]:
    """Continue after an entry that cannot be deleted; ignore one that no longer exists."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        pruned.failures[name] = error.strerror or str(error)
