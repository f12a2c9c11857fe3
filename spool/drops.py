"""Lines that were not kept: counted by cause by whoever emits, logged and reported by housekeeping."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

log = logging.getLogger("spool")

LOG_INTERVAL: Final = 60.0
"""Seconds between two warnings of one kind."""


class Warnings:
    """Logs at most one message per LOG_INTERVAL."""

    def __init__(self) -> None:
        self._logged_at = -LOG_INTERVAL

    def log(self, message: str, *values: object) -> None:
        if self.is_due():
            self._logged_at = time.monotonic()
            with contextlib.suppress(Exception):  # a handler that writes may not be interrupted by itself
                log.warning(message, *values)

    def is_due(self) -> bool:
        return self.seconds() <= 0

    def seconds(self) -> float:
        """Return the seconds after which the next message may be logged."""
        return self._logged_at + LOG_INTERVAL - time.monotonic()


class Drops:
    """Safe to use from any thread, signal handler or finalizer."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # `counts[cause] += 1` on a defaultdict runs no Python code in which a handler could come between.
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._unreported: defaultdict[str, int] = defaultdict(int)
        self._unlogged: tuple[str, str] | None = None
        self._warnings = Warnings()
        self.too_deep = 0
        """Lines dropped when the recursion limit left no room for a call, not even one of `add`."""
        self._too_deep_logged = 0

    def add(self, cause: str, message: str, *, report: bool) -> None:
        """Count a dropped line; `report` those that an operator should see among the metrics, too."""
        with self._lock:
            self._counts[cause] += 1
            if report:
                self._unreported[cause] += 1
            self._unlogged = cause, message

    def counts(self) -> Mapping[str, int]:
        """Return how many lines were dropped, by cause."""
        counts = dict(self._counts)
        if self.too_deep:
            counts["recursion"] = counts.get("recursion", 0) + self.too_deep
        return counts

    def log(self) -> None:
        """Log the last one, if the last warning is long enough ago. Not for the thread that emits."""
        if self._unlogged is None and self.too_deep > self._too_deep_logged:
            self._unlogged = "recursion", "the recursion limit is too near to encode a line"
        if self._unlogged is not None and self._warnings.is_due():
            (cause, message), self._unlogged = self._unlogged, None
            self._too_deep_logged = self.too_deep
            total = sum(self.counts().values())
            self._warnings.log("analytics line dropped (%s): %s; %d so far", cause, message, total)

    def is_waiting(self) -> bool:
        """Whether there are drops that no metric has reported yet."""
        return bool(self._unreported)

    def is_unlogged(self) -> bool:
        return self._unlogged is not None

    def seconds_until_log(self) -> float | None:
        """Return the seconds after which `log` has something to do, None if nothing was dropped since."""
        return None if self._unlogged is None else max(0.0, self._warnings.seconds())

    def take_unreported(self) -> Mapping[str, int]:
        """Return what no metric has reported yet, and clear it."""
        with self._lock:
            unreported, self._unreported = self._unreported, defaultdict(int)
        return unreported

    def give_back(self, cause: str, count: int) -> None:
        """Keep what could not be reported for the next attempt."""
        with self._lock:
            self._unreported[cause] += count
