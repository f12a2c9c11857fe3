"""A lock that reports to its holder whether it interrupts itself.

A signal handler or a finalizer may run between any two steps of a function, in that function's own thread. An
ordinary lock would block it for ever, a reentrant one would let it see half a change.
"""

from __future__ import annotations

import threading
from types import TracebackType


class ReentryLock:
    """`with lock as interrupted:` the value is true if this thread holds the lock already."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def __enter__(self) -> bool:
        self._lock.acquire()
        self._depth += 1
        return self._depth > 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        self._lock.release()
