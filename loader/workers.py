"""Files through several connections: batches of chunks are read one by one and loaded side by side.

A worker is a thread with a connection of its own. It takes the next batch from one shared pass, so that at
most one batch per worker is in memory, and tries until it is done: an outage or a mistake in the
configuration is waited out with exponential backoff, for ever or for as long as `patience` says.

Asked to stop, workers finish the batch in hand. One that can't, because the server is stuck or gone, has its
connection cut after FINISH_SECONDS, which rolls the batch back; one that still hangs, in an attempt to
connect, is left behind: nothing that a process leaves unfinished is lost.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import psycopg
import tenacity

from loader import database, sqlstate
from loader.batches import Pass, Report, Source
from loader.chunk import Chunk
from loader.errors import LoaderError, OutOfReachError
from loader.health import Health
from loader.load import Tally, load
from loader.signals import Signals
from loader.sqlstate import explain

log = logging.getLogger("loader")

_FIRST_WAIT: Final = 0.2
_LONGEST_WAIT: Final = 30.0
"""Seconds between two tries: random below a bound that doubles, so that loaders don't come back in step."""
FINISH_SECONDS: Final = 5.0
_CUT_SECONDS: Final = 2.0
"""Seconds that a worker has to notice that its connection was cut."""
_TICK_SECONDS: Final = 0.2
_PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO}
)
"""What writing rejects may meet and see go away."""

_Failure = psycopg.Error | OSError | LoaderError


class Workers:
    """Loads files into one database. Not to be used by two threads at once.

    `dsn` is asked at each connect, so that a changed password is found; `tick` is called some times a second
    while the workers are at it.
    """

    def __init__(
        self, dsn: Callable[[], str], spool: Path, count: int, signals: Signals,
        patience: float | None = None, health: Health | None = None, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._spool = spool
        self._signals = signals
        self._for_ever = patience is None
        self._health = health or Health()
        self._tick = tick
        self._dsn = dsn
        self._links = [_Link(self._connect, self._connected) for _ in range(count)]
        self._version_told = database.SCHEMA_VERSION
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._is_passing(error)),
            wait=tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
            stop=tenacity.stop_any(
                tenacity.stop_when_event_set(signals.stop),
                tenacity.stop_never if patience is None else tenacity.stop_after_delay(patience),
            ),
            sleep=self._sleep,
            before_sleep=self._told,
            reraise=True,
        )

    def connect(self) -> None:
        """Return once the database answers, or `stop` is set. Raises LoaderError if waiting did not help."""
        self._together(lambda link: self._retrying(link.connect), self._links[:1])
        if not self._signals.stop.is_set():
            self._goes_on()

    def load(self, sources: Iterable[Source]) -> Report:
        """Load files in their order and return once all are done, or `stop` is set.

        Raises LoaderError for what waiting did not help; what was committed by then is.
        """
        run = Pass(sources)
        self._together(lambda link: self._work(run, link), self._links)
        return run.report

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _together(self, work: Callable[[_Link], None], links: Sequence[_Link]) -> None:
        """Run `work` for each link side by side; raise what ended the first that failed."""
        failures: list[Exception] = []

        def one(link: _Link) -> None:
            try:
                work(link)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=[link], name="loader", daemon=True) for link in links]
        for thread in threads:
            thread.start()
        stopped_at, cut = 0.0, False
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_SECONDS)
                self._tick()
                if not self._signals.stop.is_set():
                    continue
                stopped_at = stopped_at or time.monotonic()
                waited = time.monotonic() - stopped_at
                if waited > FINISH_SECONDS and not cut:
                    log.warning("a batch takes too long to be finished: it is rolled back")
                    cut = True
                    for link in links:
                        link.cut()
                elif waited > FINISH_SECONDS + _CUT_SECONDS:
                    log.warning("a connection hangs: it is left behind")
                    return
        if failures and not self._signals.stop.is_set():
            error = failures[0]
            raise explain(error) if isinstance(error, _Failure) else error

    def _work(self, run: Pass, link: _Link) -> None:
        try:
            while not self._signals.stop.is_set() and (batch := run.take()):
                tally = self._retrying(self._load, link, [chunk for chunk, _ in batch])
                run.committed(batch, tally)
        except BaseException:
            run.give_up()
            raise

    def _load(self, link: _Link, batch: Sequence[Chunk]) -> Tally:
        link.connect()
        begun = time.monotonic()
        tally = link.load(batch, self._spool)
        self._health.loaded(tally, time.monotonic() - begun)
        self._goes_on()
        return tally

    def _goes_on(self) -> None:
        if self._health.goes_on():
            log.info("loading goes on")

    def _connect(self) -> database.Connection:
        return database.connect(self._dsn(), self._health.progressed)

    def _connected(self, connection: database.Connection) -> None:
        """Look at whose tables these are. Raises psycopg.Error where there are none."""
        with connection.transaction():
            version = database.schema_version(connection)
        if not version:
            raise psycopg.errors.UndefinedTable("the tables are not there")
        ours = database.SCHEMA_VERSION
        if version not in (ours, self._version_told):
            self._version_told = version
            how = "older: run `loader init`" if version < ours else "newer: upgrade the loader"
            log.warning("the tables are of version %d, this loader is of %d; they are %s", version, ours, how)
        self._health.connection_made()

    def _is_passing(self, error: BaseException) -> bool:
        """Whether it is worth to wait; the daemon waits for a person, too."""
        if self._for_ever:
            return isinstance(error, _Failure)
        if isinstance(error, psycopg.Error):
            return sqlstate.action(error.sqlstate) is sqlstate.Action.RETRY
        return isinstance(error, OSError) and error.errno in _PASSING

    def _told(self, state: tenacity.RetryCallState) -> None:
        """Say once that loading waits and why; what tenacity calls before each wait."""
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, _Failure) or _is_conflict(error, state.attempt_number):
            return
        reason = explain(error)
        # What an outage says changes from try to try; that it is one does not.
        cause = str(reason).partition(":")[0] if isinstance(reason, OutOfReachError) else str(reason)
        if self._health.retrying(str(reason), cause):
            log.warning("%s; waiting, with a try every %g s at least", reason, _LONGEST_WAIT)

    def _sleep(self, seconds: float) -> None:
        """Wait between two tries, unless asked to stop or to look at the settings again."""
        until, reloads = time.monotonic() + seconds, self._signals.reloads
        while (left := until - time.monotonic()) > 0 and self._signals.reloads == reloads:
            self._health.progressed()
            if self._signals.stop.wait(min(left, _TICK_SECONDS)):
                return


def _is_conflict(error: Exception, attempt: int) -> bool:
    """Whether loaders only got in each other's way, which the next try or two settle."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] == "40" and attempt < 5


class _Link:
    """A connection that is made when it is needed, and anew after it broke."""

    def __init__(
        self, connect: Callable[[], database.Connection], connected: Callable[[database.Connection], None]
    ) -> None:
        self._connect = connect
        self._connected = connected
        self._connection: database.Connection | None = None
        self._duplicates = 0.0

    def connect(self) -> None:
        if self._connection is None:
            self._connection = self._connect()
            with self._closing_where_it_fails():
                self._connected(self._connection)

    def load(self, batch: Sequence[Chunk], spool: Path) -> Tally:
        assert self._connection is not None  # it was connected
        with self._closing_where_it_fails():
            tally = load(self._connection, batch, spool, self._duplicates)
        if tally.lines:
            self._duplicates = tally.duplicates / tally.lines  # of this batch is a guess at the next
        return tally

    @contextlib.contextmanager
    def _closing_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error:
            self.close()
            raise

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def cut(self) -> None:
        """End what the connection is in the middle of, from another thread: its socket is shut down."""
        connection = self._connection
        with contextlib.suppress(psycopg.Error, OSError):
            if connection is not None:
                with socket.socket(fileno=os.dup(connection.fileno())) as line:
                    line.shutdown(socket.SHUT_RDWR)
