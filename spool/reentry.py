"""A lock that reports whether the current thread already holds it, and that no exception leaves locked.

A signal handler or a finalizer may run between any two steps of a function, in that function's own thread.
With an ordinary lock the handler would deadlock; with a reentrant one it would see a partial change. A
handler may also raise: between `acquire` and the `try`, or before the release at the end of a `with` block,
the exception would leave the lock held forever. So this lock runs the work itself, inside a single `try` that
also covers acquire and release, and checks the state of the lock, not a variable, to decide whether to
release it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

T = TypeVar("T")


class _Owned(Protocol):
    """The interface of threading.RLock, including the method that threading.Condition relies on."""

    def acquire(self, blocking: bool = True) -> bool: ...
    def release(self) -> None: ...
    def _is_owned(self) -> bool: ...


class ReentryLock:
    """Runs one piece of work at a time. Check `held_here` first if a handler may interrupt the holder."""

    def __init__(self) -> None:
        self._lock = cast(_Owned, threading.RLock())

    def held_here(self) -> bool:
        """Whether this thread holds the lock: the caller interrupted the holder, or was called by it."""
        return self._lock._is_owned()

    def run(self, work: Callable[[], T]) -> T:
        """Wait for the lock, then do the work. Raises RuntimeError if this thread already holds it."""
        if self._lock._is_owned():
            raise RuntimeError("this thread already holds the lock")
        try:
            return self._run(work)
        except BaseException:
            self._release_if_held()
            raise

    def try_run(self, work: Callable[[], object]) -> bool:
        """Do the work if the lock is free, also in this thread; return whether it was done."""
        if self._lock._is_owned():
            return False
        try:
            return self._try_run(work)
        except BaseException:
            self._release_if_held()
            raise

    # A handler may also raise while the lock is released after an exception in the work: hence twice.

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
        """Wait for the lock and keep it until `let_go`, for a fork, whose hooks are two separate calls."""
        self._lock.acquire()

    def let_go(self) -> None:
        self._release_if_held()
