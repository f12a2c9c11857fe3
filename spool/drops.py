"""Lines that were not kept: counted by cause, logged now and then, and told once lines flow again."""

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
        self._said_at = -LOG_INTERVAL

    def say(self, message: str, *values: object) -> None:
        now = time.monotonic()
        if now - self._said_at >= LOG_INTERVAL:
            self._said_at = now
            with contextlib.suppress(Exception):  # a handler that writes may not be interrupted by itself
                log.warning(message, *values)


class Drops:
    """Safe to use from any thread, signal handler or finalizer."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # `counts[cause] += 1` on a defaultdict runs no Python code in which a handler could come between.
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._untold: defaultdict[str, int] = defaultdict(int)
        self._warnings = Warnings()
        self.too_deep = 0
        """Lines dropped where the recursion limit left no room for a call, not even one of `add`."""

    def add(self, cause: str, message: str, *, tell: bool) -> None:
        """Count a dropped line; `tell` those that an operator should see among the metrics, too."""
        with self._lock:
            self._counts[cause] += 1
            if tell:
                self._untold[cause] += 1
        total = sum(self._counts.values())
        self._warnings.say("analytics line dropped (%s): %s; %d so far", cause, message, total)

    def counts(self) -> Mapping[str, int]:
        """Return how many lines were dropped, by cause."""
        counts = dict(self._counts)
        return counts | {"recursion": self.too_deep} if self.too_deep else counts

    def waiting(self) -> bool:
        """Whether there are drops that no metric has told yet."""
        return bool(self._untold)

    def take_untold(self) -> Mapping[str, int]:
        """Return what is to be told, and forget it."""
        with self._lock:
            untold, self._untold = self._untold, defaultdict(int)
        return untold

    def give_back(self, cause: str, count: int) -> None:
        """What could not be told is told later."""
        with self._lock:
            self._untold[cause] += count
