"""What is older than it has to be kept: rows, ledger rows, rejected and archived files.

Rows go by their own `timestamp`, in batches of a transaction each that lock nothing but these rows, found
through the index that begins with their kind. The ledger's go by when they were loaded, and a writer's
together, once its last one is old: the view of missing segments counts from 1. A file whose ledger rows went
is loaded again when it is met again, as from an archive. Files go by when they were written.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, LiteralString

from psycopg import sql

from loader.files import nofollow, rejects
from loader.files.retire import SUFFIX
from loader.load.database import Connection
from loader.load.tables import EVENTS, METRICS, Table
from spool.segment import SEALED

BATCH_ROWS: Final = 5000
"""Some tenths of a second of a server's work."""
_DAY: Final = re.compile(r"\d{8}")

_KINDS: Final = (
    "WITH RECURSIVE kinds AS ((SELECT {kind} AS kind FROM {table} ORDER BY 1 LIMIT 1) UNION ALL "
    "SELECT (SELECT {kind} FROM {table} WHERE {kind} > kinds.kind ORDER BY 1 LIMIT 1) FROM kinds "
    "WHERE kind IS NOT NULL) SELECT kind FROM kinds WHERE kind IS NOT NULL"
)
"""The kinds there are, by leaps through the index."""
_COUNT: Final = "SELECT count(*) FROM {table} WHERE {kind} = %s AND timestamp < %s"
_DELETE: Final = (
    "WITH old AS MATERIALIZED (SELECT {key} AS key FROM {table} WHERE {kind} = %s "
    "AND timestamp < %s AND timestamp >= %s::timestamptz ORDER BY timestamp LIMIT %s), "
    "gone AS (DELETE FROM {table} USING old WHERE {table}.{key} = old.key RETURNING {table}.timestamp) "
    "SELECT count(*), max(timestamp)::text FROM gone"
)
"""A batch begins where the last one ended, which spares the way over index entries of what is gone."""
_WRITERS: Final = "SELECT DISTINCT writer FROM analytics_loads WHERE loaded_at >= %s AND writer IS NOT NULL"
_OLD_LOADS: Final = "analytics_loads WHERE coalesce(writer, '') <> ALL(%s) AND loaded_at < %s"
_COUNT_LOADS: Final = f"SELECT count(*) FROM {_OLD_LOADS}"
_DELETE_LOADS: Final = (
    f"WITH old AS MATERIALIZED (SELECT digest AS key FROM {_OLD_LOADS} "
    "AND loaded_at >= %s::timestamptz ORDER BY loaded_at LIMIT %s), gone AS "
    "(DELETE FROM analytics_loads USING old WHERE digest = old.key RETURNING loaded_at) "
    "SELECT count(*), max(loaded_at)::text FROM gone"
)


@dataclass
class Pruned:
    """How much is old, or went: rows by table, `loads` of the ledger, files."""

    events: int = 0
    metrics: int = 0
    loads: int = 0
    rejected_files: int = 0
    archived_files: int = 0


class Rows:
    """The rows that are older than `before`. Methods raise psycopg.Error."""

    def __init__(self, connection: Connection, before: datetime) -> None:
        self._connection = connection
        self._before = before

    def count(self) -> Pruned:
        events, metrics = (
            sum(self._number(_COUNT, table, kind, self._before) for kind in self._kinds(table))
            for table in (EVENTS, METRICS)
        )
        return Pruned(events, metrics, self._number(_COUNT_LOADS, EVENTS, self._writers(), self._before))

    def delete(self, stop: threading.Event, deleted: Callable[[int], None]) -> Pruned:
        """Delete them until done or asked to stop; `deleted` is told the rows of each committed batch."""
        events, metrics = (
            sum(self._delete(_DELETE, table, kind, stop, deleted) for kind in self._kinds(table))
            for table in (EVENTS, METRICS)
        )
        loads = self._delete(_DELETE_LOADS, EVENTS, self._writers(), stop, deleted)
        return Pruned(events, metrics, loads)

    def _delete(
        self, statement: LiteralString, table: Table, which: object, stop: threading.Event,
        deleted: Callable[[int], None],
    ) -> int:  # fmt: skip
        total, count, since = 0, BATCH_ROWS, "-infinity"
        while count == BATCH_ROWS and not stop.is_set():
            ((count, last),) = self._run(statement, table, which, self._before, since, BATCH_ROWS)
            since = last or since
            total += count
            deleted(count)
        return total

    def _kinds(self, table: Table) -> list[str]:
        return [kind for (kind,) in self._run(_KINDS, table)]

    def _writers(self) -> list[str]:
        """Those of whom a segment was loaded since."""
        return [writer for (writer,) in self._run(_WRITERS, EVENTS, self._before)]

    def _number(self, statement: LiteralString, table: Table, *values: object) -> int:
        ((number,),) = self._run(statement, table, *values)
        return int(number)

    def _run(self, statement: LiteralString, table: Table, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in a transaction of its own."""
        names = {name: sql.Identifier(getattr(table, name)) for name in ("key", "kind")}
        text = sql.SQL(statement).format(table=sql.Identifier(table.name), **names)
        with self._connection.transaction():
            return self._connection.execute(text, values).fetchall()


def files(spool: Path, archive: Path | None, before: datetime, *, dry_run: bool) -> Pruned:
    """Remove the rejected and archived files that are older than `before`, or count them. Raises OSError."""
    limit = before.timestamp()
    pruned = Pruned()
    with contextlib.suppress(FileNotFoundError), nofollow.opened(spool / rejects.DIRECTORY) as rejected:
        pruned.rejected_files = _remove(rejected, (SEALED, rejects.WHOLE), limit, dry_run)
    if archive is not None:
        with contextlib.suppress(FileNotFoundError), nofollow.opened(archive) as base:
            for name in filter(_DAY.fullmatch, os.listdir(base)):
                with nofollow.opened(name, base) as day:
                    pruned.archived_files += _remove(day, (SEALED + SUFFIX,), limit, dry_run)
                if not dry_run:
                    with contextlib.suppress(OSError):  # there is more in it
                        os.rmdir(name, dir_fd=base)
    return pruned


def _remove(where: int, suffixes: tuple[str, ...], limit: float, dry_run: bool) -> int:
    count = 0
    for name in nofollow.names(where, suffixes):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(name, dir_fd=where, follow_symlinks=False).st_mtime < limit:
                if not dry_run:
                    os.unlink(name, dir_fd=where)
                count += 1
    return count
