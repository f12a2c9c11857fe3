"""A lock that knows whether its holder interrupts itself, and that no exception leaves behind.

A signal handler or a finalizer may run between any two steps of a function, in that function's own thread. An
ordinary lock would block it forever, a reentrant one would let it see half a change. And a handler may
raise: between `acquire` and the `try`, or before the release at the end of a `with` block, that would leave
the lock taken for good. So a lock runs the work itself, inside the one `try` that also covers both calls,
and asks the lock, not a variable, whether it has to be released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

T = TypeVar("T")


class _Owned(Protocol):
    """What threading.RLock offers, with the method that threading.Condition relies on, too."""

    def acquire(self, blocking: bool = True) -> bool: ...
    def release(self) -> None: ...
    def _is_owned(self) -> bool: ...


class ReentryLock:
    """Runs one piece of work at a time. Check `held_here` first where a handler may interrupt."""

    def __init__(self) -> None:
        self._lock = cast(_Owned, threading.RLock())

    def held_here(self) -> bool:
        """Whether this thread holds the lock: then it interrupts itself, or was called by the holder."""
        return self._lock._is_owned()

    def run(self, work: Callable[[], T]) -> T:
        """Wait for the lock, then do the work. Raises RuntimeError if this thread holds it already."""
        if self._lock._is_owned():
            raise RuntimeError("the lock is held by this thread already")
        try:
            return self._run(work)
        except BaseException:
            self._release_if_held()
            raise

    def try_run(self, work: Callable[[], object]) -> bool:
        """Do the work if nobody, this thread included, holds the lock; return whether it was done."""
        if self._lock._is_owned():
            return False
        try:
            return self._try_run(work)
        except BaseException:
            self._release_if_held()
            raise

    # A handler may also raise while the lock is released after an exception of the work: hence twice.

    def _run(self, work: Callable[[], T]) -> T:
        try:
            self._lock.acquire()
            result = work()
            self._lock.release()
            return result
        except BaseException:
            self._release_if_held()
            raise

    def _try_run(self, work: Callable[[], object]) -> bool:
        try:
            if not self._lock.acquire(blocking=False):
                return False
            work()
            self._lock.release()
            return True
        except BaseException:
            self._release_if_held()
            raise

    def _release_if_held(self) -> None:
        if self._lock._is_owned():
            self._lock.release()

    def hold(self) -> None:
        """Wait for the lock and keep it until `let_go`: for a fork, whose hooks are two calls."""
        self._lock.acquire()

    def let_go(self) -> None:
        self._release_if_held()
