"""A thread that keeps house: it is started when there is something to do first, and sleeps in between.

Nothing depends on it. If it cannot run (a forked child before its first emit, the interpreter's end, no
thread left, greenlets that never yield) emits do without: it only prepares what they need and tidies up.

It is started without `threading.Thread`, whose `start` waits for the new thread: 68-311 ms beside three busy
threads, and forever while Python 3.11 finalizes.

A fork in C copies the condition variable of the GIL with those who wait on it. If one of them was the
parent's housekeeping thread, the child would hang as soon as two of its threads want the GIL. So such a child
has no thread: the emit that begins a new millisecond does the work when it is due (`do_if_due`).
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
"""How long `stop` waits for the work in hand."""
_WAKING_SECONDS: Final = 0.001
"""How long before its time a thread may wake up."""
_VANISH_SECONDS: Final = 0.1
"""How long `stop` waits for the kernel to forget a thread whose work has ended; usually some microseconds."""


@dataclass
class _Running:
    """A thread and what it is reached by."""

    # Its `put` is reentrant (docs.python.org, queue.SimpleQueue): a signal handler may interrupt one. It is
    # made with the thread: where gevent has patched both in between (a gunicorn worker that was forked from a
    # preloaded application), a greenlet would wait in a call that stops all others.
    wakes: queue.SimpleQueue[bool] = field(default_factory=lambda: queue.SimpleQueue())
    ended: threading.Event = field(default_factory=lambda: threading.Event())
    ident: int = 0
    native_id: int = 0
    asleep_until: float = float("-inf")
    """Until when (time.monotonic) it does not want the GIL, unless it is woken."""


class Housekeeper:
    """Calls `work` after each `wake`, and as often as `work` asks for by the seconds it returns."""

    def __init__(self, work: Callable[[], float | None], *, threaded: bool = True) -> None:
        self.threaded = threaded
        self._work = work
        self._doing = ReentryLock()
        self._next = 0.0
        self._running: _Running | None = None
        self._starting = ReentryLock()

    def wake(self) -> None:
        """Have the work done soon. Never raises, never waits."""
        if self._running is None and self.threaded:
            self._starting.try_run(self._start)
        if (running := self._running) is not None:
            running.wakes.put(True)

    def is_surely_asleep(self) -> bool:
        """Whether the thread cannot want the GIL now. For a child: the state at the fork."""
        running = self._running
        return running is None or (running.wakes.empty() and running.asleep_until > time.monotonic())

    def do_if_due(self) -> None:
        """Without a thread: do the work in the calling one, as often as it asks for."""
        if time.monotonic() >= self._next:
            self._doing.try_run(self._do)

    def _do(self) -> None:
        wait = self._work_or_log()
        self._next = time.monotonic() + (0.1 if wait is None else max(wait, 0.01))

    def _start(self) -> None:
        if self._running is None and not sys.is_finalizing():
            running = _Running()
            with contextlib.suppress(RuntimeError):  # the interpreter is ending, or has no thread left
                _thread.start_new_thread(self._run, (running,))
                self._running = running

    def stop(self) -> bool:
        """Wait for the work in hand and end the thread; the next `wake` starts another.

        Returns whether there was one.
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
                logger().exception("housekeeping failed; trying again")
            return 1.0


def _go_on(running: _Running, wait: float | None) -> bool:
    """Sleep until there is work; False when the thread is to end."""
    wakes = running.wakes
    running.asleep_until = float("inf") if wait is None else time.monotonic() + wait - _WAKING_SECONDS
    try:
        go_on = wakes.get(timeout=wait)
        while go_on and not wakes.empty():  # many wake-ups are one piece of work
            go_on = wakes.get(timeout=0)
    except queue.Empty:
        return True
    finally:
        running.asleep_until = float("-inf")
    return go_on


def _wait_until_gone(native_id: int) -> None:
    """Wait for the kernel's part of the thread, which os.fork of Python 3.12 counts."""
    deadline = time.monotonic() + _VANISH_SECONDS
    while os.path.exists(f"/proc/self/task/{native_id}") and time.monotonic() < deadline:
        time.sleep(0)
