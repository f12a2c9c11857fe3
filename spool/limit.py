"""`max_spool_bytes`: how much the segments of a spool hold, without a scan by whoever emits.

Scanning takes 0.4-1.5 s with 100,000 files, so only housekeeping measures. In between, the segments that this
process makes count with all their capacity. A process that has not measured yet, or a few that make segments
at the same time, may exceed the limit by a segment each, the first of which is small.
"""

from __future__ import annotations

import errno
import time
from typing import Final

_FRESH_SECONDS: Final = 10.0
"""How long a measurement is good for."""
_AHEAD: Final = 4
"""Segments that must still fit, else the spool is measured again."""
_SHARE_OF_TIME: Final = 0.1
"""Of the time at most that measuring may take, when a full spool is measured again and again."""


class SpoolLimit:
    """Changed by whoever holds the appender's `_creating`."""

    def __init__(self, limit: int, before: SpoolLimit | None = None) -> None:
        """`before` is that of the process which this one was forked from."""
        self._limit = limit
        self._used: int = 0 if before is None else before._used
        self._measured_at: float | None = None if before is None else before._measured_at
        self._took = 0.0

    def is_due(self, capacity: int) -> bool:
        """Whether to measure: what is known is old, or leaves no room."""
        if not self._limit:
            return False
        age = float("inf") if self._measured_at is None else time.monotonic() - self._measured_at
        full = self._used + _AHEAD * capacity > self._limit
        return age >= _FRESH_SECONDS or (full and age * _SHARE_OF_TIME >= self._took)

    def begin(self) -> tuple[float, int]:
        """Return what `finish` needs: when a measurement began, and what was used by then."""
        return time.monotonic(), self._used

    def finish(self, begun: tuple[float, int], measured: int) -> None:
        """Take over a measurement. What was reserved since it began may be in it or not, so it counts as well."""
        begun_at, used_before = begun
        self._used = measured + self._used - used_before
        self._measured_at = time.monotonic()
        self._took = self._measured_at - begun_at

    def reserve(self, capacity: int) -> None:
        """Count a segment that is about to be made. Raises OSError (EDQUOT) if it would be too much."""
        if self._limit and self._used + capacity > self._limit:
            raise OSError(errno.EDQUOT, f"the spool has reached max_spool_bytes ({self._limit})")
        self._used += capacity
