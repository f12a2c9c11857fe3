"""The health of a loader: its counts since it started, and why it waits.

The worker threads update it; the notifications to systemd and the metrics are derived from it.
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
"""Upper bounds, in seconds, of the histogram of batch durations; the last bucket has none."""
_RATE_SECONDS: Final = 60.0


class Health:
    """Counts and states. Any thread that makes progress calls `progressed`."""

    def __init__(self, progressed: Callable[[], None] = lambda: None) -> None:
        self.progressed = progressed
        self.total = Loaded()
        self.files = 0
        self.retries = 0
        self.connected = False
        self.waits_for: str | None = None
        """Why loading waits at the moment."""
        self.unreadable: str | None = None
        """Why the last scan of the spool failed."""
        self.connections: int | None = None
        """Number of loading connections, if fewer than workers."""
        self.last_error: str | None = None
        self.last_error_at = 0.0
        """Seconds since 1970."""
        self.buckets = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0
        """Total duration of all batches."""
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
        """Return why no row can be loaded at the moment, or None if rows can be loaded."""
        if not self.connected and self.waits_for is None:
            return "the database has not answered yet"
        return self.waits_for or self.unreadable

    def limited_to(self, connections: int | None) -> bool:
        """Record the number of loading connections (None: all). Returns whether it changed."""
        with self._lock:
            before, self.connections = self.connections, connections
        return before != connections

    def recovered(self) -> bool:
        """Record that the loader is not waiting. Returns whether that ended a wait."""
        with self._lock:
            waited, self.waits_for = self.waits_for, None
        return waited is not None

    def loaded(self, loaded: Loaded, seconds: float) -> None:
        """Record a committed batch and its duration in seconds."""
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
        """Return the files and lines loaded since the last call."""
        with self._lock:
            taken, self._unlogged = self._unlogged, (0, Loaded())
        return taken

    def failed(self, reason: str) -> None:
        """Record an error that does not stop the loader."""
        self.last_error, self.last_error_at = reason, time.time()

    def retrying(self, reason: str, cause: str) -> bool:
        """Record that a batch is retried. Returns whether that starts a wait, or changes its cause."""
        with self._lock:
            self.retries += 1
            begins, self._cause = self.waits_for is None or cause != self._cause, cause
            self.waits_for = reason
            self.failed(reason)
        self.progressed()
        return begins

    def knows(self, error: Exception) -> bool:
        """Whether the error is an outage for which the load already waits, and which it has reported."""
        return self.waits_for is not None and isinstance(error, OutOfReachError)

    def rows_per_second(self) -> float:
        """Return the rate over the last minute, or since the start."""
        with self._lock:
            self._forget()
            rows = sum(rows for _, rows in self._recent)
        return rows / max(1.0, min(_RATE_SECONDS, time.monotonic() - self._started))

    def _forget(self) -> None:
        """Forget samples older than the period of the rate."""
        while self._recent and self._recent[0][0] < time.monotonic() - _RATE_SECONDS:
            self._recent.popleft()
