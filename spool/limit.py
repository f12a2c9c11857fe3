"""`max_spool_bytes`: limits the size of a spool's segments without a scan by the emitting thread.

Scanning takes 0.4-1.5 s with 100,000 files, so only housekeeping measures. Between measurements, the segments
that this process creates count with their full capacity. A process that has not measured yet, and processes
that create segments at the same time, may exceed the limit by one segment each; the first segment of a
process is small.
"""

from __future__ import annotations

import errno
import time
from typing import Final

_FRESH_SECONDS: Final = 10.0
"""Seconds for which a measurement is valid."""
_AHEAD: Final = 4
"""If fewer segments than this still fit, the spool is measured again."""
_SHARE_OF_TIME: Final = 0.1
"""The maximum share of time spent on measuring when a full spool is measured repeatedly."""


class SpoolLimit:
    """The used and the allowed bytes of a spool. Changed only while holding the appender's `_creating`."""

    def __init__(self, limit: int, before: SpoolLimit | None = None) -> None:
        """`before` is the limit of the parent process, if this one was forked."""
        self._limit = limit
        self._used: int = 0 if before is None else before._used
        self._measured_at: float | None = None if before is None else before._measured_at
        self._took = 0.0

    def is_due(self, capacity: int) -> bool:
        """Whether to measure: the last measurement is old, or there is no room according to it."""
        if not self._limit:
            return False
        age = float("inf") if self._measured_at is None else time.monotonic() - self._measured_at
        full = self._used + _AHEAD * capacity > self._limit
        return age >= _FRESH_SECONDS or (full and age * _SHARE_OF_TIME >= self._took)

    def begin(self) -> tuple[float, int]:
        """Return the state that `finish` needs: when the measurement began, and the bytes used at that time."""
        return time.monotonic(), self._used

    def finish(self, begun: tuple[float, int], measured: int) -> None:
        """Adopt a measurement. Bytes reserved since it began may be missing from it, so they are added."""
        begun_at, used_before = begun
        self._used = measured + self._used - used_before
        self._measured_at = time.monotonic()
        self._took = self._measured_at - begun_at

    def reserve(self, capacity: int) -> None:
        """Count a segment before it is created. Raises OSError (EDQUOT) if it would exceed the limit."""
        if self._limit and self._used + capacity > self._limit:
            raise OSError(errno.EDQUOT, f"the spool has reached max_spool_bytes ({self._limit})")
        self._used += capacity
