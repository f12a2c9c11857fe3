"""Loads files over several connections: batches are read one after the other and loaded in parallel.

A worker is a thread with its own connection. Once connected, it takes a batch (batches.py), loads it,
commits, and retires the completed files. A worker that cannot connect while another is connected retries
periodically, so the files are loaded over as many connections as are available, at least one. Without any
connection, the workers wait according to retry.py.

On a stop, workers finish their current batch. If a worker cannot, because the server hangs or is unreachable,
its connection is cut after FINISH_SECONDS, which rolls the batch back. A worker that still hangs in an
attempt to connect is abandoned, which loses nothing: its files stay in the spool.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import psycopg

from loader.errors import LoaderError
from loader.files.chunk import Chunk
from loader.files.rejects import CannotWriteError
from loader.load.counts import Loaded
from loader.load.database import Connection, connect
from loader.load.erasures import Erasures
from loader.load.schema import SCHEMA_VERSION, schema_version
from loader.load.sqlstate import explain, is_temporary, lacks_partition
from loader.service.connection import WorkerConnection
from loader.service.health import Health
from loader.service.queue import BatchQueue
from loader.service.retry import Failure, RetryPolicy
from loader.service.run import LoadRun, Report, Source
from loader.service.signals import Signals

log = logging.getLogger("loader")

FINISH_SECONDS: Final = 5.0
_CUT_SECONDS: Final = 2.0
"""Seconds for a worker to notice that its connection was cut."""
_TICK_SECONDS: Final = 0.2


class Workers:
    """Loads files into one database. Not to be used by two threads at once.

    `dsn` is called for each connection, so that a changed password is used; `tick` is called several times a
    second while the workers are busy. Without `patience`, in seconds, they wait forever for the end of an
    outage.
    """

    def __init__(
        self, dsn: Callable[[], str], spool: Path, count: int, signals: Signals,
        patience: float | None = None, health: Health | None = None, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.dsn = dsn
        self._spool = spool
        self._signals = signals
        self._health = health or Health()
        self._tick = tick
        self._retry = RetryPolicy(signals, self._health, patience)
        self._connections = [WorkerConnection(self._connect, self._check_version) for _ in range(count)]
        self._reported_version = SCHEMA_VERSION

    def connect(self) -> None:
        """Wait until the database answers or `stop` is set. Raises LoaderError if waiting did not help."""
        for connection in self._connections:
            connection.close_if_lost()
        if any(connection.is_open for connection in self._connections):
            return
        first = self._connections[0]
        self._run_in_threads([lambda: self._retry.call(first.connect)])
        if not self._signals.stop.is_set():
            self._retry.recovered()

    def load(self, sources: Iterable[Source]) -> Report:
        """Load files in order; return once all are loaded or `stop` is set.

        Raises LoaderError if waiting did not help; batches committed by then remain.
        """
        run = LoadRun(sources, self._health.progressed)
        batches = BatchQueue(run)
        self._run_in_threads([self._worker(batches, connection) for connection in self._connections])
        run.retire_finished()  # files without lines
        if batches.refusal is not None and not self._signals.stop.is_set():
            self._retry.refused(batches.refusal)
            run.report.failures.clear()  # all have the same reason, which was already reported
        return run.report

    def erasures(self) -> Erasures | None:
        """Return the erased people if a connection is open, else None. Not to be called during a load."""
        for connection in self._connections:
            with contextlib.suppress(psycopg.Error):  # which the next load waits out
                if connection.is_open:
                    return connection.erasures()
        return None

    @property
    def stopping(self) -> bool:
        """Whether `stop` is set."""
        return self._signals.stop.is_set()

    def close(self) -> None:
        """Close the connections. Safe to repeat."""
        for connection in self._connections:
            connection.close()

    # ---- a worker -----------------------------------------------------------------------------------

    def _worker(self, batches: BatchQueue, connection: WorkerConnection) -> Callable[[], None]:
        return lambda: self._work(batches, connection)

    def _work(self, batches: BatchQueue, connection: WorkerConnection) -> None:
        try:
            while not self._signals.stop.is_set() and not batches.done():
                if batches.wait(_TICK_SECONDS):
                    self._retry.call(self._attempt, batches, connection)
        except BaseException:
            batches.give_up()
            raise

    def _attempt(self, batches: BatchQueue, connection: WorkerConnection) -> None:
        """Load a batch if there are one and a connection. Raises errors that are worth waiting for."""
        if not self._has_connection(connection) or not (batch := batches.take()):
            return
        try:
            loaded = self._load(connection, [chunk for chunk, _ in batch])
        except psycopg.Error as error:
            if is_temporary(error):
                batches.give_back(batch)
                raise
            if lacks_partition(error):
                batches.set_aside(batch, str(explain(error)))
            else:
                batches.postpone(batch, error, str(explain(error)))
        except LoaderError as error:  # the ledger does not store its rows
            batches.postpone(batch, error, str(error))
        except CannotWriteError as error:
            batches.set_aside(batch, f"its rejects could not be written: {error}")
        except BaseException:
            batches.give_back(batch)
            raise
        else:
            batches.commit(batch, loaded)

    def _load(self, connection: WorkerConnection, batch: Sequence[Chunk]) -> Loaded:
        started = time.monotonic()
        loaded = connection.load(batch, self._spool)
        self._health.loaded(loaded, time.monotonic() - started)
        self._retry.recovered()
        return loaded

    def _has_connection(self, connection: WorkerConnection) -> bool:
        """Connect a worker if possible; return whether it is connected. It may be unconnected while others are."""
        if connection.is_open:
            return True
        if not any(other.is_open for other in self._connections):
            connection.connect()
            return True
        if not connection.is_due:
            self._signals.stop.wait(_TICK_SECONDS)
            return False
        try:
            connection.connect()
        except (psycopg.Error, OSError, LoaderError) as error:
            if connection.failures > 1:  # a single failure may be an outage that the others will notice soon
                self._report_connections(f": {explain(error)}")
            return False
        if self._health.connections is not None:
            self._report_connections()
        return True

    def _report_connections(self, why: str = "") -> None:
        """Log once that there are fewer connections than workers, and once when all are connected again."""
        count, workers = sum(connection.is_open for connection in self._connections), len(self._connections)
        if self._health.limited_to(count if count < workers else None):
            level = logging.WARNING if count < workers else logging.INFO
            log.log(level, "loading with %d of %d connections%s", count, workers, why)

    def _connect(self) -> Connection:
        return connect(self.dsn(), self._health.progressed)

    def _check_version(self, connection: Connection) -> None:
        """Log a warning if the schema version differs. Raises psycopg.Error if there are no tables."""
        with connection.transaction():
            version = schema_version(connection)
        if not version:
            raise psycopg.errors.UndefinedTable("the tables do not exist")
        if version not in (SCHEMA_VERSION, self._reported_version):
            self._reported_version = version
            if version < SCHEMA_VERSION:
                log.warning("schema version %d is older than this loader's %d: run `loader init`",
                            version, SCHEMA_VERSION)  # fmt: skip
            else:
                log.warning("schema version %d is newer than this loader's %d: upgrade the loader",
                            version, SCHEMA_VERSION)  # fmt: skip
        self._health.connection_made()

    # ---- threads ------------------------------------------------------------------------------------

    def _run_in_threads(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run the tasks in parallel; raise the error of the first that failed."""
        failures: list[Exception] = []

        def run(task: Callable[[], None]) -> None:
            try:
                task()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=[task], name="loader", daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        self._join(threads)
        if failures and not self._signals.stop.is_set():
            error = failures[0]
            raise explain(error) if isinstance(error, Failure) else error

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        """Wait until all have ended; after a stop, cut their connections and limit the wait."""
        self._wait(threads, lambda: not self._signals.stop.is_set())
        if self._wait_seconds(threads, FINISH_SECONDS):
            return
        log.warning("the current batch takes too long: rolling it back")
        for connection in self._connections:
            connection.cut()
        if not self._wait_seconds(threads, _CUT_SECONDS):
            log.warning("a connection hangs: abandoning it")

    def _wait_seconds(self, threads: Sequence[threading.Thread], seconds: float) -> bool:
        """Return whether all threads ended in time."""
        deadline = time.monotonic() + seconds
        return self._wait(threads, lambda: time.monotonic() < deadline)

    def _wait(self, threads: Sequence[threading.Thread], going_on: Callable[[], bool]) -> bool:
        """Wait while any thread is alive and the condition holds. Returns whether all have ended."""
        while alive := next((thread for thread in threads if thread.is_alive()), None):
            if not going_on():
                return False
            alive.join(_TICK_SECONDS)
            self._tick()
        return True
