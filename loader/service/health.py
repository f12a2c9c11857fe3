"""The status of a loader: what it did since it started, and what it waits for.

The workers update it, from their threads; the notifications to systemd and the metrics are derived from it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Final

from loader.errors import OutOfReachError
from loader.load.counts import Loaded

BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds of how long a batch takes; the last bucket has none."""
_RATE_SECONDS: Final = 60.0


class Health:
    """Counts and states. `progressed` is called whenever there was progress, from any thread."""

    def __init__(self, progressed: Callable[[], None] = lambda: None) -> None:
        self.progressed = progressed
        self.total = Loaded()
        self.files = 0
        self.retries = 0
        self.connected = False
        self.waits_for: str | None = None
        """Why nothing is loaded at the moment."""
        self.unreadable: str | None = None
        """Why the spool could not be scanned the last time."""
        self.connections: int | None = None
        """Connections that load, if there are fewer than workers."""
        self.last_error: str | None = None
        self.last_error_at = 0.0
        """Seconds since 1970."""
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        """All batches' time together."""
        self._unlogged = (0, Loaded())
        """Files and lines since the last summary."""
        self._cause = ""
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()

    def connection_made(self) -> None:
        self.connected = True
        self.progressed()

    def obstacle(self) -> str | None:
        """Return why no row can be loaded at the moment, None if rows can be loaded."""
        if not self.connected and self.waits_for is None:
            return "the database has not answered yet"
        return self.waits_for or self.unreadable

    def limited_to(self, connections: int | None) -> bool:
        """Note that so many connections load, None for all. Return whether that is new."""
        with self._lock:
            before, self.connections = self.connections, connections
        return before != connections

    def recovered(self) -> bool:
        """Note that the loader waits for nothing. Return whether that ended a wait."""
        with self._lock:
            waited, self.waits_for = self.waits_for, None
        return waited is not None

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """Note that a batch was committed, after so many seconds."""
        with self._lock:
            self.total += loaded
            files, lines = self._unlogged
            self._unlogged = files, lines + loaded
            self.buckets[bisect_left(BUCKETS, seconds)] += 1
            self.seconds += seconds
            self._recent.append((time.monotonic(), loaded.counts.rows))
            self._forget()
        self.progressed()

    def files_done(self, files: int) -> None:
        with self._lock:
            self.files += files
            before, lines = self._unlogged
            self._unlogged = before + files, lines

    def take_unlogged(self) -> tuple[int, Loaded]:
        """Return the files and the lines that were loaded since the last call."""
        with self._lock:
            taken, self._unlogged = self._unlogged, (0, Loaded())
        return taken

    def failed(self, reason: str) -> None:
        """Note an error that does not stop the loader."""
        self.last_error, self.last_error_at = reason, time.time()

    def retrying(self, reason: str, cause: str) -> bool:
        """Note that a batch is retried. Return whether that begins a wait, or one for another cause."""
        with self._lock:
            self.retries += 1
            begins, self._cause = self.waits_for is None or cause != self._cause, cause
            self.waits_for = reason
            self.failed(reason)
        self.progressed()
        return begins

    def knows(self, error: Exception) -> bool:
        """Whether it is an outage that the load waits out already, and has reported."""
        return self.waits_for is not None and isinstance(error, OutOfReachError)

    def rows_per_second(self) -> float:
        """Return the rate of the last minute, or since the start."""
        with self._lock:
            self._forget()
            rows = sum(rows for _, rows in self._recent)
        return rows / max(1.0, min(_RATE_SECONDS, time.monotonic() - self._started))

    def _forget(self) -> None:
        """Drop what is older than the rate goes back."""
        while self._recent and self._recent[0][0] < time.monotonic() - _RATE_SECONDS:
            self._recent.popleft()
