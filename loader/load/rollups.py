"""Computes the rollups of touched hours, and reports their state.

Readers always get exact answers (schema.sql, "questions"); a refresh makes them fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

import psycopg

from loader.errors import LoaderError
from loader.load.database import Connection, is_distributed, transaction

SLICE_HOURS: Final = 168
"""Hours computed by one transaction: some seconds of server time at 10 events per second."""
_TOUCHED: Final = (
    "SELECT pg_catalog.count(DISTINCT hour) FILTER (WHERE pg_catalog.isfinite(hour)), "
    "pg_catalog.min(hour) FILTER (WHERE pg_catalog.isfinite(hour)), "
    "coalesce(pg_catalog.bool_or(NOT pg_catalog.isfinite(hour)), false), "
    "pg_catalog.date_part('epoch', pg_catalog.now() - pg_catalog.min(hour) FILTER (WHERE pg_catalog.isfinite(hour))) "
    "FROM analytics_touched WHERE source <> 'users'"
)
_WAITING: Final = (
    "SELECT EXISTS (SELECT FROM analytics_touched AS mark "
    "WHERE source <> 'users' AND hour <= pg_catalog.now() - interval '1 hour' AND NOT EXISTS ("
    "SELECT FROM analytics_sealed AS sealed WHERE sealed.source = mark.source AND sealed.hour = mark.hour))"
)
"""Whether a refresh would compute anything."""
_DIFFERENCES: Final = (
    "SELECT * FROM analytics_check_rollups('-infinity'::timestamptz, 'infinity'::timestamptz)"
)
_PAUSE_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Touched:
    """The touched hours, which readers compute from rows: their number, the oldest, and how long ago it began.

    `unbuilt` means that no rollup was computed since the tables were upgraded.
    """

    hours: int
    oldest: datetime | None
    unbuilt: bool
    age: timedelta | None

    def facts(self) -> dict[str, object]:
        """Return the values by the names that `loader status` prints."""
        return {
            "touched_hours": self.hours, "oldest_touched": self.oldest,
            "touched_seconds": None if self.age is None else round(self.age.total_seconds()),
            "built": not self.unbuilt,
        }  # fmt: skip


def touched(connection: Connection) -> Touched:
    """Return the touched hours. Raises psycopg.Error."""
    ((hours, oldest, unbuilt, seconds),) = connection.execute(_TOUCHED).fetchall()
    age = (
        None if seconds is None else timedelta(seconds=seconds)
    )  # not an interval, whose text form depends on a setting
    return Touched(hours, oldest, unbuilt, age)


def refresh(connection: Connection, stopped: Callable[[], bool] = lambda: False) -> int:
    """Compute touched hours and days that have ended, in several transactions.

    Returns their number, or 0 while another refresh runs. The connection must not be in a transaction. Raises
    psycopg.Error, and psycopg.errors.SerializationFailure if another refresh was faster: try again.
    """
    total, done = 0, 1
    while done and not stopped():
        done = _in_one_snapshot(connection, f"SELECT analytics_refresh({SLICE_HOURS})")
        total += done
    return total


def refresh_patiently(connection: Connection, stopped: Callable[[], bool], patience: float) -> int:
    """Refresh until everything is computed, even beside another refresh; return the number of hours and days.

    `patience` is in seconds. Raises psycopg.Error as `refresh` does, and LoaderError if the schema version
    has no rollups, or if another refresh is still running.
    """
    total, deadline = 0, time.monotonic() + patience
    while not stopped():
        try:
            total += refresh(connection, stopped)
        except psycopg.errors.SerializationFailure:
            if time.monotonic() > deadline:
                raise
            continue
        except psycopg.errors.UndefinedFunction as error:
            raise LoaderError("the tables have no rollups: run `loader init` as their owner") from error
        with transaction(connection):
            ((waiting,),) = connection.execute(_WAITING).fetchall()
        if not waiting:
            break
        if time.monotonic() > deadline:
            raise LoaderError("another refresh of the rollups is still running: try again later")
        time.sleep(_PAUSE_SECONDS)  # the end of another session's transaction cannot be observed
    return total


def differences(connection: Connection) -> list[tuple[str, datetime, int, int]]:
    """Return the hours whose rollup differs from their rows: source, hour, count of rows, count in the rollup.

    Touched and pruned hours are omitted: the former are answered from rows, and the latter have no rows.
    Reads all rows. Raises psycopg.Error.
    """
    with transaction(connection, "REPEATABLE READ"):
        return connection.execute(_DIFFERENCES).fetchall()


def rebuild(connection: Connection) -> int:
    """Mark all hours except pruned ones, so that `refresh` recomputes them, and return their number.

    Raises psycopg.Error.
    """
    return _in_one_snapshot(connection, "SELECT analytics_rebuild()")


def _in_one_snapshot(connection: Connection, statement: str) -> int:
    with transaction(connection, "REPEATABLE READ"):
        if is_distributed(connection):
            _wait_for_workers(connection)
        ((value,),) = connection.execute(statement.encode()).fetchall()
    return int(value)


_PREPARED: Final = (
    "SELECT success, result FROM run_command_on_workers('SELECT pg_catalog.string_agg(gid, '','') "
    "FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()')"
)
WORKERS_SECONDS: Final = 5.0


def _wait_for_workers(connection: Connection) -> None:
    """Wait until the workers of Citus have committed what the snapshot of the coordinator sees as committed.

    A mark whose rows are not visible yet would be deleted, and the rollup lack them for ever. The workers' own
    snapshots begin after this. Raises SerializationFailure if it takes too long, as after a crash.
    """
    deadline = time.monotonic() + WORKERS_SECONDS
    awaited = prepared = _prepared(connection)
    while awaited & prepared:
        if time.monotonic() > deadline:
            raise psycopg.errors.SerializationFailure("transactions of Citus are in doubt: try again")
        time.sleep(_PAUSE_SECONDS)  # nothing reports the end of a prepared transaction
        prepared = _prepared(connection)


def _prepared(connection: Connection) -> set[str]:
    """Return the names of the transactions that are prepared on workers."""
    names: set[str] = set()
    for answers, result in connection.execute(_PREPARED):
        if not answers:
            raise psycopg.OperationalError(f"a worker of Citus does not answer: {result}")
        names.update(filter(None, (result or "").split(",")))
    return names
