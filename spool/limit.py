"""`max_spool_bytes`: how much the segments of a spool hold, without a scan by whoever emits.

Scanning takes 0.4-1.5 s with 100,000 files, so only housekeeping measures. In between, the segments that this
process makes count with all their capacity. A process that has not measured yet, or a few that make segments
at the same time, may exceed the limit by a segment each, the first of which is small.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Final

from spool.segment import written_bytes

_FRESH_SECONDS: Final = 10.0
"""How long a measurement is good for."""
_AHEAD: Final = 4
"""Segments that must still fit, else the spool is measured again."""
_SHARE_OF_TIME: Final = 0.1
"""Of the time at most that measuring may take, when a full spool is measured again and again."""


class SpoolLimit:
    """Changed by whoever holds the appender's `_creating`."""

    def __init__(self, directory: Path, limit: int, before: SpoolLimit | None = None) -> None:
        """`before` is that of the process which this one was forked from."""
        self._directory = directory
        self._limit = limit
        self._used: int = 0 if before is None else before._used
        self._measured_at: float | None = None if before is None else before._measured_at
        self._took = 0.0

    def measure_if_due(self, capacity: int, token: str) -> None:
        """Measure the spool if what is known is old or leaves no room. Raises OSError."""
        if not self._limit:
            return
        age = float("inf") if self._measured_at is None else time.monotonic() - self._measured_at
        full = self._used + _AHEAD * capacity > self._limit
        if age >= _FRESH_SECONDS or (full and age * _SHARE_OF_TIME >= self._took):
            begin = time.monotonic()
            self._used = written_bytes(self._directory, token)
            self._measured_at = time.monotonic()
            self._took = self._measured_at - begin

    def reserve(self, capacity: int) -> None:
        """Count a segment that is about to be made. Raises OSError (EDQUOT) if it would be too much."""
        if self._limit and self._used + capacity > self._limit:
            raise OSError(errno.EDQUOT, f"the spool has reached max_spool_bytes ({self._limit})")
        self._used += capacity
