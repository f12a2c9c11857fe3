"""Lines that were not kept: counted by cause, logged at intervals, reported as a metric once lines flow again."""

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
        now = time.monotonic()
        if now - self._logged_at >= LOG_INTERVAL:
            self._logged_at = now
            with contextlib.suppress(Exception):  # a handler that writes may not be interrupted by itself
                log.warning(message, *values)


class Drops:
    """Safe to use from any thread, signal handler or finalizer."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # `counts[cause] += 1` on a defaultdict runs no Python code in which a handler could come between.
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._unreported: defaultdict[str, int] = defaultdict(int)
        self._warnings = Warnings()

    def add(self, cause: str, message: str, *, report: bool) -> None:
        """Count a dropped line; `report` those that an operator should see among the metrics, too."""
        with self._lock:
            self._counts[cause] += 1
            if report:
                self._unreported[cause] += 1
        total = sum(self._counts.values())
        self._warnings.log("analytics line dropped (%s): %s; %d so far", cause, message, total)

    def counts(self) -> Mapping[str, int]:
        """Return how many lines were dropped, by cause."""
        return dict(self._counts)

    def waiting(self) -> bool:
        """Whether there are drops that no metric has reported yet."""
        return bool(self._unreported)

    def take_unreported(self) -> Mapping[str, int]:
        """Return what no metric has reported yet, and clear it."""
        with self._lock:
            unreported, self._unreported = self._unreported, defaultdict(int)
        return unreported

    def give_back(self, cause: str, count: int) -> None:
        """Keep what could not be reported for the next attempt."""
        with self._lock:
            self._unreported[cause] += count
