"""Deletes data older than the retention time: rows, ledger rows, rejected and archived files.

The age of a row is that of the hour of its `timestamp`, by the server's clock. Rows are deleted in batches,
each a transaction that takes no lock needed by a load. Their counts remain in the rollups, which are
refreshed first (schema.sql, analytics_prune_hour). A batch is repeated after a deadlock or a lock timeout.
The age of ledger rows is the time since their load; the rows of one writer are deleted together, once the
last one is old, because the view of missing segments counts from 1. After that, a file that is read again,
such as from an archive, is loaded again. The age of files is that of their modification time.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, LiteralString, cast

import psycopg
from psycopg import sql

from loader.files import nofollow, rejects
from loader.files.retire import SUFFIX
from loader.load import rollups
from loader.load.database import Connection, transaction
from loader.load.tables import EVENTS, METRICS, Table
from spool.segment import SEALED

BATCH_ROWS: Final = 5000
"""Some tenths of a second of server time."""
_DAY: Final = re.compile(r"[0-9]{8}")

_KINDS: Final = (
    "WITH RECURSIVE kinds AS ((SELECT {kind} AS kind FROM {table} ORDER BY 1 LIMIT 1) UNION ALL "
    "SELECT (SELECT {kind} FROM {table} WHERE {kind} OPERATOR(pg_catalog.>) kinds.kind ORDER BY 1 LIMIT 1) "
    "FROM kinds "
    "WHERE kind IS NOT NULL) SELECT kind FROM kinds WHERE kind IS NOT NULL"
)
"""The existing kinds, by a loose index scan."""
_COUNT: Final = (
    "SELECT pg_catalog.count(*) FROM {table} WHERE {kind} OPERATOR(pg_catalog.=) %s AND timestamp < %s"
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
"""The last account of a running writer is kept, like its ledger rows."""


_LOCK_SECONDS: Final = 5
_PATIENCE: Final = 60.0
"""Seconds for which a batch is repeated while other sessions block it."""
_REPEATED: Final = ("40001", "40P01", "55P03", "57014")
"""serialization_failure, deadlock_detected, lock_not_available, query_canceled (by a timeout)."""


@dataclass
class Pruned:
    """The number of old or deleted items: rows by table, `loads` of the ledger, files.

    `skipped` maps each archive entry that is not a day's directory to the reason for skipping it, and
    `failures` maps what could not be deleted.
    """

    events: int = 0
    metrics: int = 0
    loads: int = 0
    rejected_files: int = 0
    archived_files: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the counts by the names that `loader prune` prints."""
        return {
            "events": self.events, "metrics": self.metrics, "loads": self.loads,
            "rejected_files": self.rejected_files, "archived_files": self.archived_files,
        }  # fmt: skip


class Rows:
    """The rows older than `age`; `before` is the limit by the server's clock. Methods raise psycopg.Error.

    Only whole hours of the tables are deleted: rows of the hour that contains `before` are kept until it has passed.
    """

    def __init__(self, connection: Connection, age: timedelta, stop: threading.Event) -> None:
        self._connection = connection
        self._stop = stop
        statement = (
            "SELECT before, pg_catalog.date_trunc('hour', before, 'UTC') "
            "FROM (SELECT pg_catalog.now() - %s::interval AS before) AS clock"
        )
        ((self._before, self._before_hour),) = self._run(statement, EVENTS, age)

    @property
    def before(self) -> datetime:
        return cast(datetime, self._before)

    def count(self) -> Pruned:
        events, metrics = (
            sum(self._number(_COUNT, table, kind, self._before_hour) for kind in self._kinds(table))
            for table in (EVENTS, METRICS)
        )
        return Pruned(events, metrics, self._number(_COUNT_LOADS, EVENTS, self._writers(), self._before))

    def delete(self, deleted: Callable[[int], None]) -> Pruned:
        """Delete them, or stop when asked to; `deleted` is called with the rows of each committed batch.

        Raises LoaderError if the tables are of a version without rollups.
        """
        rollups.refresh_patiently(self._connection, self._stop.is_set, _PATIENCE)
        events, metrics = (self._delete_rows(source, deleted) for source in ("events", "metrics"))
        # Before the ledger rows: without those, lines would appear to be missing.
        self._delete_statements(self._writers())
        return Pruned(events, metrics, self._delete_loads(deleted))

    def _delete_statements(self, writers: list[str]) -> None:
        """Delete old accounts of writers, including the last one if the writer's ledger rows are old."""
        if self._run("SELECT pg_catalog.to_regclass('analytics_writers') IS NOT NULL", EVENTS) == [(True,)]:
            self._run(_DELETE_STATEMENTS, EVENTS, self._before, writers)

    def _delete_rows(self, source: Literal["events", "metrics"], deleted: Callable[[int], None]) -> int:
        total = 0
        for (hour,) in self._run(_HOURS, EVENTS, source, self._before_hour):
            count = BATCH_ROWS
            while count == BATCH_ROWS and not self._stop.is_set():
                count = self._number(_PRUNE_HOUR, EVENTS, source, hour, BATCH_ROWS)
                total += count
                deleted(count)
        return total

    def _delete_loads(self, deleted: Callable[[int], None]) -> int:
        total, count, since, writers = 0, BATCH_ROWS, "-infinity", self._writers()
        while count == BATCH_ROWS and not self._stop.is_set():
            ((count, last),) = self._run(_DELETE_LOADS, EVENTS, writers, self._before, since, BATCH_ROWS)
            since = last or since
            total += count
            deleted(count)
        return total

    def _kinds(self, table: Table) -> list[str]:
        return [kind for (kind,) in self._run(_KINDS, table)]

    def _writers(self) -> list[str]:
        """Return the writers with a segment loaded since then."""
        return [writer for (writer,) in self._run(_WRITERS, EVENTS, self._before)]

    def _number(self, statement: LiteralString, table: Table, *values: object) -> int:
        ((number,),) = self._run(statement, table, *values)
        return int(number)

    def _run(self, statement: LiteralString, table: Table, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in its own transaction, and retry if other sessions blocked it."""
        text = sql.SQL(statement).format(table=sql.Identifier(table.name), kind=sql.Identifier(table.kind))
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                with transaction(self._connection):
                    self._connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'".encode())
                    return self._connection.execute(text, values).fetchall()
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
