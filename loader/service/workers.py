"""Files through several connections: batches of chunks are read one by one and loaded side by side.

A worker is a thread with a connection of its own. It takes the next batch of a shared run, so that at most
one batch per worker is in memory, loads it with retries (retry.py), commits and retires the finished files.

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

from loader.files.chunk import Chunk
from loader.files.rejects import CannotWriteError
from loader.load.counts import Loaded
from loader.load.database import Connection, connect
from loader.load.schema import SCHEMA_VERSION, schema_version
from loader.load.sqlstate import explain
from loader.service.connection import WorkerConnection
from loader.service.health import Health
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
        first = self._connections[0]
        self._run_in_threads([lambda: self._retry.call(first.connect)])
        if not self._signals.stop.is_set():
            self._retry.recovered()

    def load(self, sources: Iterable[Source]) -> Report:
        """Load files in their order and return once all are loaded, or `stop` is set.

        Raises LoaderError if waiting did not help; what was committed by then stays.
        """
        run = LoadRun(sources, self._health.progressed)
        self._run_in_threads([self._worker(run, connection) for connection in self._connections])
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

    def _worker(self, run: LoadRun, connection: WorkerConnection) -> Callable[[], None]:
        return lambda: self._work(run, connection)

    def _work(self, run: LoadRun, connection: WorkerConnection) -> None:
        try:
            while not self._signals.stop.is_set() and (batch := run.take()):
                try:
                    loaded = self._retry.call(self._load, connection, [chunk for chunk, _ in batch])
                except CannotWriteError as error:
                    run.set_aside(batch, error)
                    continue
                run.commit(batch, loaded)
                run.retire_finished()
            run.retire_finished()  # files without a line
        except BaseException:
            run.give_up()
            raise

    def _load(self, connection: WorkerConnection, batch: Sequence[Chunk]) -> Loaded:
        connection.connect()
        started = time.monotonic()
        loaded = connection.load(batch, self._spool)
        self._health.loaded(loaded, time.monotonic() - started)
        self._retry.recovered()
        return loaded

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
