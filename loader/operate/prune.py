"""Removes what is older than it has to be kept: rows, ledger rows, rejected and archived files.

Rows are removed by the hour of their own `timestamp` and by the server's clock, in batches of a transaction
each that lock nothing that a load wants. Their counts stay in the rollups, which are refreshed before
(schema.sql, analytics_prune_hour). A batch that meets a deadlock or a lock is repeated. Ledger rows are removed
by when they were loaded, and a writer's together, once its last one is old: the view of missing segments counts
from 1. A file whose ledger rows were removed is loaded again when it is read again, as from an archive. Files
are removed by when they were written.

Operators are qualified because those on `varchar` are not exactly those of pg_catalog (see schema.sql).
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
from loader.load.database import Connection, is_distributed, transaction
from loader.load.tables import EVENTS, METRICS, Table
from spool.segment import SEALED

BATCH_ROWS: Final = 5000
"""Some tenths of a second of a server's work."""
_DAY: Final = re.compile(r"[0-9]{8}")

_KINDS: Final = (
    "WITH RECURSIVE kinds AS ((SELECT {kind} AS kind FROM {table} ORDER BY 1 LIMIT 1) UNION ALL "
    "SELECT (SELECT {kind} FROM {table} WHERE {kind} OPERATOR(pg_catalog.>) kinds.kind ORDER BY 1 LIMIT 1) "
    "FROM kinds "
    "WHERE kind IS NOT NULL) SELECT kind FROM kinds WHERE kind IS NOT NULL"
)
"""The kinds there are, by leaps through the index."""
_KINDS_DISTRIBUTED: Final = "SELECT DISTINCT {kind} FROM {table}"
"""Citus allows no recursion over a distributed table."""
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
"""A batch begins where the last one ended, which spares the way over index entries of what is gone."""

_DELETE_STATEMENTS: Final = (
    "DELETE FROM analytics_writers AS each WHERE reported_at < %s AND (writer <> ALL(%s::text[]) OR EXISTS "
    "(SELECT FROM analytics_writers AS later WHERE later.writer = each.writer "
    "AND later.reported_at > each.reported_at)) RETURNING 1"
)
"""A living writer's last statement stays, as its ledger rows do."""


_LOCK_SECONDS: Final = 5
_PATIENCE: Final = 60.0
"""Seconds that a batch is repeated which other sessions keep from its rows."""
_REPEATED: Final = ("40001", "40P01", "55P03", "57014")
"""serialization_failure, deadlock_detected, lock_not_available, query_canceled (by a timeout)."""


@dataclass
class Pruned:
    """How much is old, or was removed: rows by table, `loads` of the ledger, files.

    `skipped` maps an entry of the archive that is not a day's directory to why it was left alone, and
    `failures` what could not be removed.
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
    """The rows that are older than `age` by the server's clock, `before`. Methods raise psycopg.Error.

    Of the tables, whole hours: rows of the hour in which `before` lies stay until it has passed.
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
        """Delete them until done or asked to stop; `deleted` gets the rows of each committed batch.

        Raises LoaderError if the tables are of a version without rollups.
        """
        rollups.refresh_patiently(self._connection, self._stop.is_set, _PATIENCE)
        events, metrics = (self._delete_rows(source, deleted) for source in ("events", "metrics"))
        # Before the ledger's rows: without those, lines would seem to be missing.
        self._delete_statements(self._writers())
        return Pruned(events, metrics, self._delete_loads(deleted))

    def _delete_statements(self, writers: list[str]) -> None:
        """Remove the old statements of writers, all of those whose ledger rows are old."""
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
        statement: LiteralString = _KINDS_DISTRIBUTED if is_distributed(self._connection) else _KINDS
        return [kind for (kind,) in self._run(statement, table)]

    def _writers(self) -> list[str]:
        """Those of whom a segment was loaded since."""
        return [writer for (writer,) in self._run(_WRITERS, EVENTS, self._before)]

    def _number(self, statement: LiteralString, table: Table, *values: object) -> int:
        ((number,),) = self._run(statement, table, *values)
        return int(number)

    def _run(self, statement: LiteralString, table: Table, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in a transaction of its own, again if other sessions were in its way."""
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
    """Remove the rejected and archived files that are older than `before`, or count them."""
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
        pruned.skipped[name] = "is a file, not the directory of a day"
        return 0
    with nofollow.opened(name, base) as day:
        count = _remove(day, (SEALED + SUFFIX,), before, pruned, dry_run)
    if not dry_run:
        with contextlib.suppress(OSError):  # there is more in it
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
    """Go on after an entry that cannot be removed; one that no longer exists needs nothing."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        pruned.failures[name] = error.strerror or str(error)
