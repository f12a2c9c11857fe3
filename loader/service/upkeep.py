"""Maintenance of rollups and partitions by the daemon, without blocking the load.

Each run has a thread with its own connection. An interrupted run is rolled back, and the next one finds the
remaining work.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from loader.errors import one_line
from loader.load import ledger, partitions, rollups
from loader.load.database import Connection, connect
from loader.load.sqlstate import is_lost

log = logging.getLogger("loader")

IDLE_SECONDS: Final = 60.0
BUSY_SECONDS: Final = 300.0
"""Seconds between refreshes; longer under load, when a backfill may touch the same hours repeatedly."""
PARTITION_SECONDS: Final = 3600.0
_PATIENCE_SECONDS: Final = 300.0
"""Seconds for which an hourly run tries to get the locks for a partition; there is enough time, because it is
created days ahead."""
_STOP_SECONDS: Final = 2.0
_OLDER_TABLES: Final = (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable)

Stopped = Callable[[], bool]


class Upkeep:
    """Calls `run` periodically. To be used by one thread.

    The `seconds` between two runs depend on whether files are being loaded.
    """

    def __init__(
        self, dsn: Callable[[], str], purpose: str, run: Callable[[Connection, Stopped], None],
        seconds: Callable[[bool], float], *, at_once: bool = False,
    ) -> None:  # fmt: skip
        self._dsn = dsn
        self._purpose = purpose
        self._run = run
        self._seconds = seconds
        self._thread: threading.Thread | None = None
        self._connection: Connection | None = None
        self._stopped = threading.Event()
        self._last = float("-inf") if at_once else time.monotonic()
        self._reported: str | None = None

    def tick(self, *, busy: bool) -> None:
        """Start a run if one is due. Call it often; it returns immediately."""
        running = self._thread is not None and self._thread.is_alive()
        due = self._last + self._seconds(busy)
        if not running and not self._stopped.is_set() and time.monotonic() >= due:
            self._thread = threading.Thread(target=self._run_once, name="upkeep", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Interrupt a running run."""
        self._stopped.set()
        connection, thread = self._connection, self._thread
        if thread is not None and thread.is_alive():
            if connection is not None:
                with contextlib.suppress(psycopg.Error):  # it has ended, or the server does not answer
                    connection.cancel_safe(timeout=_STOP_SECONDS)
            thread.join(_STOP_SECONDS)

    def _run_once(self) -> None:
        problem = None
        try:
            with connect(self._dsn()) as self._connection:
                self._run(self._connection, self._stopped.is_set)
        except (psycopg.errors.SerializationFailure, *_OLDER_TABLES):
            pass  # the next run finds the same work; older tables need no maintenance
        except psycopg.OperationalError as error:
            problem = (
                None if is_lost(error) else one_line(str(error))
            )  # an outage is reported by the load itself
        except Exception as error:
            problem = one_line(str(error))
        finally:
            self._connection = None
            self._last = time.monotonic()
        if problem is not None and problem != self._reported and not self._stopped.is_set():
            log.warning("could not %s: %s", self._purpose, problem)
        self._reported = problem


def refresher(dsn: Callable[[], str]) -> Upkeep:
    """Return the maintenance of the rollups and the ledger, which waits for no lock that a load holds."""
    return Upkeep(
        dsn, "refresh the rollups or merge the ledger", _refresh,
        lambda busy: BUSY_SECONDS if busy else IDLE_SECONDS,
    )  # fmt: skip


def partitioner(dsn: Callable[[], str]) -> Upkeep:
    """Return the maintenance of the partitions: creates them for the next days, at the start and each hour."""
    return Upkeep(dsn, "create partitions", _make_partitions, lambda _: PARTITION_SECONDS, at_once=True)


def make_partitions_quietly(dsn: Callable[[], str]) -> None:
    """Create the partitions of the next days for a one-off load. If it fails, rows use the default partition."""
    with contextlib.suppress(psycopg.Error), connect(dsn()) as connection:
        partitions.make(connection, patience=1.0)


def _refresh(connection: Connection, stopped: Stopped) -> None:
    if done := rollups.refresh(connection, stopped):
        log.info("refreshed the rollups of %d hours and days", done, extra={"refreshed": done})
    if merged := ledger.merge(connection, stopped):
        log.info("merged %d rows of the ledger", merged, extra={"merged": merged})


def _make_partitions(connection: Connection, stopped: Stopped) -> None:
    if made := partitions.make(connection, stopped=stopped, patience=_PATIENCE_SECONDS):
        log.info("created %d partitions", made, extra={"partitions": made})
