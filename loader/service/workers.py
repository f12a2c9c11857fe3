"""Files through several connections: batches of chunks are read one by one and loaded side by side.

A worker is a thread with a connection of its own. It takes a batch only when it has that connection
(batches.py), loads it, commits and retires the finished files. One that cannot connect while another is
connected tries again from time to time: the files are loaded with as many connections as there are, down to
one. Without any, the workers wait as retry.py says.

Asked to stop, workers finish the batch in hand. One that cannot, because the server is stuck or gone, has its
connection cut after FINISH_SECONDS, which rolls the batch back; one that still hangs, in an attempt to
connect, is abandoned: nothing that a process leaves unfinished is lost.
"""

from __future__ import annotations

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
"""Seconds that a worker has to notice that its connection was cut."""
_TICK_SECONDS: Final = 0.2


class Workers:
    """Loads files into one database. Not to be used by two threads at once.

    `dsn` is called at each connect, so that a changed password is found; `tick` is called some times a second
    while the workers are busy. Without `patience`, in seconds, an outage is waited out forever.
    """

    def __init__(
        self, dsn: Callable[[], str], spool: Path, count: int, signals: Signals,
        patience: float | None = None, health: Health | None = None, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._dsn = dsn
        self._spool = spool
        self._signals = signals
        self._health = health or Health()
        self._tick = tick
        self._retry = RetryPolicy(signals, self._health, patience)
        self._connections = [WorkerConnection(self._connect, self._check_version) for _ in range(count)]
        self._reported_version = SCHEMA_VERSION

    def connect(self) -> None:
        """Return once the database answers, or `stop` is set. Raises LoaderError if waiting did not help."""
        for connection in self._connections:
            connection.close_if_lost()
        if any(connection.is_open for connection in self._connections):
            return
        first = self._connections[0]
        self._run_in_threads([lambda: self._retry.call(first.connect)])
        if not self._signals.stop.is_set():
            self._retry.recovered()

    def load(self, sources: Iterable[Source]) -> Report:
        """Load files in their order and return once all are loaded, or `stop` is set.

        Raises LoaderError if waiting did not help; what was committed by then stays.
        """
        run = LoadRun(sources, self._health.progressed)
        batches = BatchQueue(run)
        self._run_in_threads([self._worker(batches, connection) for connection in self._connections])
        run.retire_finished()  # files without a line
        if batches.refusal is not None and not self._signals.stop.is_set():
            self._retry.refused(batches.refusal)
            run.report.failures.clear()  # one reason for all of them, which was reported
        return run.report

    @property
    def stopping(self) -> bool:
        """Whether they were asked to stop."""
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
        """Load a batch if there is one, and a connection. Raises what is worth waiting for."""
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
        except LoaderError as error:  # the ledger does not keep its rows
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
        """Return whether a worker has its connection now; it may do without one while others have theirs."""
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
            if connection.failures > 1:  # one failure may be an outage, which the others are about to notice
                self._report_connections(f": {explain(error)}")
            return False
        if self._health.connections is not None:
            self._report_connections()
        return True

    def _report_connections(self, why: str = "") -> None:
        """Log once that there are fewer connections than workers, and when there are as many again."""
        count, workers = sum(connection.is_open for connection in self._connections), len(self._connections)
        if self._health.limited_to(count if count < workers else None):
            level = logging.WARNING if count < workers else logging.INFO
            log.log(level, "loading with %d of %d connections%s", count, workers, why)

    def _connect(self) -> Connection:
        return connect(self._dsn(), self._health.progressed)

    def _check_version(self, connection: Connection) -> None:
        """Log tables of another version. Raises psycopg.Error if there are none."""
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
        """Run the tasks side by side; raise the error of the first that failed."""
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
        """Wait until all have ended; once asked to stop, no longer than it takes to cut their connections."""
        self._wait(threads, lambda: not self._signals.stop.is_set())
        if self._wait_seconds(threads, FINISH_SECONDS):
            return
        log.warning("a batch takes too long to finish: rolling it back")
        for connection in self._connections:
            connection.cut()
        if not self._wait_seconds(threads, _CUT_SECONDS):
            log.warning("a connection hangs: abandoning it")

    def _wait_seconds(self, threads: Sequence[threading.Thread], seconds: float) -> bool:
        """Return whether all threads ended in time."""
        deadline = time.monotonic() + seconds
        return self._wait(threads, lambda: time.monotonic() < deadline)

    def _wait(self, threads: Sequence[threading.Thread], going_on: Callable[[], bool]) -> bool:
        """Wait while any thread is alive and the condition holds. Return whether all have ended."""
        while alive := next((thread for thread in threads if thread.is_alive()), None):
            if not going_on():
                return False
            alive.join(_TICK_SECONDS)
            self._tick()
        return True
