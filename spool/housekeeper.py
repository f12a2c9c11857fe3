"""The housekeeping thread: started when there is work for the first time, it sleeps between pieces of work.

Nothing depends on it for correctness. If it cannot run (a forked child before its first emit, interpreter
shutdown, no thread available, greenlets that never yield), emits work without it: it only prepares segments
and cleans up.

It does not use `threading.Thread`, whose `start` waits for the new thread: 68-311 ms with three busy threads,
and forever while Python 3.11 finalizes.

A fork in C copies the condition variable of the GIL with its waiters. If the parent's housekeeping thread was
one of them, the child would hang as soon as two of its threads want the GIL. So such a child starts no
thread; the first emit of each millisecond does the work if it is due (`do_if_due`).
"""

from __future__ import annotations

import _thread
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from spool.log import logger
from spool.reentry import ReentryLock

_STOP_SECONDS: Final = 5.0
"""Seconds for which `stop` waits for work in progress."""
_WAKING_SECONDS: Final = 0.001
"""Seconds by which a thread may wake up too early."""
_VANISH_SECONDS: Final = 0.1
"""Seconds for which `stop` waits until the kernel has removed a returned thread; usually some microseconds."""


@dataclass
class _Running:
    """A running thread and its communication channels."""

    # Its `put` is reentrant (docs.python.org, queue.SimpleQueue): a signal handler may interrupt one. It is
    # created together with the thread: if gevent patched the modules in between (in a gunicorn worker forked
    # from a preloaded application), a greenlet would wait in an unpatched call that blocks all other
    # greenlets.
    wakes: queue.SimpleQueue[bool] = field(default_factory=lambda: queue.SimpleQueue())
    ended: threading.Event = field(default_factory=lambda: threading.Event())
    ident: int = 0
    native_id: int = 0
    asleep_until: float = float("-inf")
    """Until when (time.monotonic) the thread sleeps without needing the GIL, unless it is woken."""


class Housekeeper:
    """Calls `work` after each `wake`, and again after the number of seconds that `work` returns."""

    def __init__(self, work: Callable[[], float | None], *, threaded: bool = True) -> None:
        self.threaded = threaded
        self._work = work
        self._doing = ReentryLock()
        self._next = 0.0
        self._running: _Running | None = None
        self._starting = ReentryLock()

    def wake(self) -> None:
        """Request that the work is done soon. Never raises, never waits."""
        if self._running is None and self.threaded:
            self._starting.try_run(self._start)
        if (running := self._running) is not None:
            running.wakes.put(True)

    def is_surely_asleep(self) -> bool:
        """Whether the thread cannot be waiting for the GIL now. In a child: at the time of the fork."""
        running = self._running
        return running is None or (running.wakes.empty() and running.asleep_until > time.monotonic())

    def do_if_due(self) -> None:
        """Without a housekeeping thread, do the work in the calling thread if it is due."""
        if time.monotonic() >= self._next:
            self._doing.try_run(self._do)

    def _do(self) -> None:
        wait = self._work_or_log()
        self._next = time.monotonic() + (0.1 if wait is None else max(wait, 0.01))

    def _start(self) -> None:
        if self._running is None and not sys.is_finalizing():
            running = _Running()
            with contextlib.suppress(
                RuntimeError
            ):  # the interpreter is shutting down, or no thread is available
                _thread.start_new_thread(self._run, (running,))
                self._running = running

    def stop(self) -> bool:
        """Wait for work in progress and end the thread; the next `wake` starts another.

        Returns whether there was a thread.
        """
        running, self._running = self._running, None
        if running is None:
            return False
        running.wakes.put(False)
        if running.ident != threading.get_ident() and running.ended.wait(_STOP_SECONDS):
            _wait_until_gone(running.native_id)
        return True

    def _run(self, running: _Running) -> None:
        running.ident, running.native_id = threading.get_ident(), threading.get_native_id()
        try:
            wait: float | None = 0.0
            while _go_on(running, wait):
                wait = self._work_or_log()
        finally:
            running.ended.set()

    def _work_or_log(self) -> float | None:
        try:
            return self._work()
        except Exception:
            with contextlib.suppress(Exception):
                logger().exception("housekeeping failed; retrying")
            return 1.0


def _go_on(running: _Running, wait: float | None) -> bool:
    """Sleep until there is work. Returns False if the thread should end."""
    wakes = running.wakes
    running.asleep_until = float("inf") if wait is None else time.monotonic() + wait - _WAKING_SECONDS
    try:
        go_on = wakes.get(timeout=wait)
        while go_on and not wakes.empty():  # several wake-ups are handled by one run
            go_on = wakes.get(timeout=0)
    except queue.Empty:
        return True
    finally:
        running.asleep_until = float("-inf")
    return go_on


def _wait_until_gone(native_id: int) -> None:
    """Wait until the kernel has removed the thread: os.fork of Python 3.12 counts kernel threads."""
    deadline = time.monotonic() + _VANISH_SECONDS
    while os.path.exists(f"/proc/self/task/{native_id}") and time.monotonic() < deadline:
        time.sleep(0)
