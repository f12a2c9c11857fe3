"""Files through several connections: batches of chunks are read one by one and loaded side by side.

A worker is a thread with a connection of its own. It takes the next batch from one shared iterator, so that
at most one batch per worker is in memory, and tries until it is done: an outage or a mistake in the
configuration is waited out with exponential backoff, for ever or for as long as `patience` says. A file is
done when all its chunks are committed, whoever loaded them.
"""

from __future__ import annotations

import errno
import logging
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import psycopg
import tenacity
import zstandard

from loader import database, sqlstate
from loader.chunk import CHUNK_BYTES, Chunk, chunks
from loader.errors import LoaderError, OutOfReachError
from loader.load import Tally, load

log = logging.getLogger("loader")

BATCH_CHUNKS: Final = 256
"""Small files that share a transaction at most."""
_FIRST_WAIT: Final = 0.2
_LONGEST_WAIT: Final = 30.0
"""Seconds between two tries: random below a bound that doubles, so that loaders don't come back in step."""

_PASSING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO}
)
"""What writing rejects may meet and see go away."""

UNREADABLE: Final = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)
"""What reading a file that is cut short or damaged raises, also from a decompressor."""


class Source(Protocol):
    """A file to load."""

    name: str

    def open(self) -> BinaryIO:
        """Return the bytes of its lines. Raises OSError."""

    def done(self, *, oversize: bool) -> None:
        """All of it is committed; `oversize` tells that a line was too long to be kept as a reject."""


@dataclass
class Report:
    """What a pass over some files did; `failures` maps the file that could not be read to why."""

    tally: Tally = field(default_factory=Tally)
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class _Reading:
    """A file of which some chunks are not committed, or not read yet."""

    source: Source
    pending: int = 0
    whole: bool = False
    oversize: bool = False


_Batch = list[tuple[Chunk, _Reading]]


class Workers:
    """Loads files into one database. Not to be used by two threads at once."""

    def __init__(
        self, dsn: str, spool: Path, count: int, stop: threading.Event, patience: float | None = None
    ) -> None:
        self._spool = spool
        self._stop = stop
        self._links = [_Link(dsn) for _ in range(count)]
        self._outage = _Outage()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._is_passing(error)),
            wait=tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
            stop=tenacity.stop_any(
                tenacity.stop_when_event_set(stop),
                tenacity.stop_never if patience is None else tenacity.stop_after_delay(patience),
            ),
            sleep=tenacity.sleep_using_event(stop),
            before_sleep=self._outage.told,
            reraise=True,
        )
        self._for_ever = patience is None

    def load(self, sources: Iterable[Source], progress: Callable[[Tally], None] = lambda _: None) -> Report:
        """Load files in their order and return once all are done, or `stop` is set.

        Raises LoaderError for what waiting did not help; what was committed by then is.
        """
        run = _Run(sources, progress)
        with ThreadPoolExecutor(len(self._links), "loader") as pool:
            working = [pool.submit(self._work, run, link) for link in self._links]
        for each in working:
            try:
                each.result()
            except (psycopg.Error, OSError) as error:
                if not self._stop.is_set():
                    raise explain(error) from error
        return run.report

    def close(self) -> None:
        for link in self._links:
            link.close()

    def _work(self, run: _Run, link: _Link) -> None:
        try:
            while not self._stop.is_set() and (batch := run.take()):
                chunks = [chunk for chunk, _ in batch]
                tally = self._retrying(link.load, chunks, self._spool)
                self._outage.over()
                run.committed(batch, tally)
        except BaseException:
            run.give_up()
            raise

    def _is_passing(self, error: BaseException) -> bool:
        """Whether it is worth to wait; the daemon waits for a person, too."""
        if isinstance(error, psycopg.Error):
            return self._for_ever or sqlstate.action(error.sqlstate) is sqlstate.Action.RETRY
        return isinstance(error, OSError) and (self._for_ever or error.errno in _PASSING)


class _Outage:
    """Says once that loading waits and why, and once that it goes on; several workers share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits_for: str | None = None

    def told(self, state: tenacity.RetryCallState) -> None:
        """What tenacity calls before each wait."""
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, psycopg.Error | OSError) or _is_conflict(error, state.attempt_number):
            return
        reason = explain(error)
        # What an outage says changes from try to try; that it is one does not.
        cause = OutOfReachError.__name__ if isinstance(reason, OutOfReachError) else str(reason)
        with self._lock:
            if cause != self._waits_for:
                self._waits_for = cause
                log.warning("%s; waiting, with a try every %g s at least", reason, _LONGEST_WAIT)

    def over(self) -> None:
        """A load went well."""
        with self._lock:
            if self._waits_for is not None:
                self._waits_for = None
                log.info("loading goes on")


def _is_conflict(error: psycopg.Error | OSError, attempt: int) -> bool:
    """Whether loaders only got in each other's way, which the next try or two settle."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "")[:2] == "40" and attempt < 5


class _Link:
    """A connection that is made when it is needed, and anew after it broke."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: database.Connection | None = None
        self._duplicates = 0.0

    def load(self, batch: Sequence[Chunk], spool: Path) -> Tally:
        if self._connection is None:
            self._connection = database.connect(self._dsn)
        try:
            tally = load(self._connection, batch, spool, self._duplicates)
            if tally.lines:
                self._duplicates = tally.duplicates / tally.lines  # of this batch is a guess at the next
            return tally
        except psycopg.Error:
            self.close()
            raise

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Run:
    """One pass over some files: the batches that are left, and the files that are not done."""

    def __init__(self, sources: Iterable[Source], progress: Callable[[Tally], None]) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._progress = progress
        self._batches = self._read(sources)

    def take(self) -> _Batch | None:
        with self._lock:
            return next(self._batches, None)

    def give_up(self) -> None:
        with self._lock:
            self._batches = iter(())

    def committed(self, batch: _Batch, tally: Tally) -> None:
        with self._lock:
            self.report.tally += tally
            self._progress(tally)
            for _, reading in batch:
                reading.pending -= 1
                self._finish(reading)

    def _read(self, sources: Iterable[Source]) -> Iterator[_Batch]:
        batch: _Batch = []
        room = CHUNK_BYTES
        for chunk, reading in self._chunks(sources):
            if batch and (chunk.size > room or len(batch) == BATCH_CHUNKS):
                yield batch
                batch, room = [], CHUNK_BYTES
            batch.append((chunk, reading))
            room -= chunk.size
        if batch:
            yield batch

    def _chunks(self, sources: Iterable[Source]) -> Iterator[tuple[Chunk, _Reading]]:
        for source in sources:
            reading = _Reading(source)
            try:
                with source.open() as stream:
                    for chunk in chunks(stream, source.name):
                        reading.pending += 1
                        reading.oversize |= chunk.oversize
                        yield chunk, reading
            except UNREADABLE as error:
                self._fail(source, f"can't be read: {error}")
                continue
            reading.whole = True
            self._finish(reading)

    def _finish(self, reading: _Reading) -> None:
        if reading.whole and not reading.pending:
            self.report.files += 1
            try:
                reading.source.done(oversize=reading.oversize)
            except OSError as error:
                self._fail(reading.source, f"is loaded, but can't be removed: {error}")

    def _fail(self, source: Source, why: str) -> None:
        log.error("%r %s", source.name, why)
        self.report.failures[source.name] = why


def explain(error: psycopg.Error | OSError) -> LoaderError:
    """Return what ends a command because of this error."""
    message = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, OSError):
        return LoaderError(f"can't write rejects: {message}")
    if error.sqlstate is None or sqlstate.action(error.sqlstate) is sqlstate.Action.RETRY:
        return OutOfReachError(f"the database is out of reach: {message}")
    return LoaderError(": ".join(filter(None, (message, sqlstate.advice(error.sqlstate)))))
