"""The daemon's refresher: computes the rollups of hours that have ended, beside the load, not in its way.

It also merges the ledger's rows of such hours.

A thread per refresh, with a connection of its own. A refresh waits for no lock and holds none that a load
wants; one that is cut off is rolled back, and the marks of its hours stay.
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
from loader.load import ledger, rollups
from loader.load.database import connect
from loader.load.sqlstate import is_lost

log = logging.getLogger("loader")

IDLE_SECONDS: Final = 60.0
BUSY_SECONDS: Final = 300.0
"""Seconds between refreshes; longer under load, where a backfill may touch the same hours again and again."""
_STOP_SECONDS: Final = 2.0
_OLDER_TABLES: Final = (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable)


class Refresher:
    """Refreshes the rollups from time to time. To be used by one thread."""

    def __init__(self, dsn: Callable[[], str]) -> None:
        self._dsn = dsn
        self._thread: threading.Thread | None = None
        self._connection: psycopg.Connection[tuple[object, ...]] | None = None
        self._stopped = threading.Event()
        self._last = time.monotonic()
        self._reported: str | None = None

    def tick(self, *, busy: bool) -> None:
        """Start a refresh if one is due. Call it often; it returns at once."""
        running = self._thread is not None and self._thread.is_alive()
        due = self._last + (BUSY_SECONDS if busy else IDLE_SECONDS)
        if not running and not self._stopped.is_set() and time.monotonic() >= due:
            self._thread = threading.Thread(target=self._refresh, name="rollup", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Cut off a refresh that is running."""
        self._stopped.set()
        connection, thread = self._connection, self._thread
        if thread is not None and thread.is_alive():
            if connection is not None:
                with contextlib.suppress(psycopg.Error):  # it has ended, or the server does not answer
                    connection.cancel_safe(timeout=_STOP_SECONDS)
            thread.join(_STOP_SECONDS)

    def _refresh(self) -> None:
        problem = None
        try:
            with connect(self._dsn()) as self._connection:
                done = rollups.refresh(self._connection, self._stopped.is_set)
                merged = ledger.merge(self._connection, self._stopped.is_set)
            if merged:
                log.info("merged %d rows of the ledger", merged, extra={"merged": merged})
            if done:
                log.info("refreshed the rollups of %d hours and days", done, extra={"refreshed": done})
        except (psycopg.errors.SerializationFailure, *_OLDER_TABLES):
            pass  # the next one finds the marks again; tables of an earlier version have no rollups
        except psycopg.OperationalError as error:
            problem = None if is_lost(error) else one_line(str(error))  # the load itself reports an outage
        except Exception as error:
            problem = one_line(str(error))
        finally:
            self._connection = None
            self._last = time.monotonic()
        if problem is not None and problem != self._reported and not self._stopped.is_set():
            log.warning("could not refresh the rollups or merge the ledger: %s", problem)
        self._reported = problem
