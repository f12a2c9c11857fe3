"""A thread that keeps house: it is started when there is something to do first, and sleeps in between.

Nothing depends on it. Where it can't be (a forked child before its first emit, the interpreter's end, no
thread left, greenlets that never yield) emits do without: it only prepares what they need and tidies up.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger("spool")

_STOP_SECONDS = 5.0
"""How long `stop` waits for the work in hand."""


class Housekeeper:
    """Calls `work` after each `wake`, and as often as `work` asks for by the seconds it returns."""

    def __init__(self, work: Callable[[], float | None]) -> None:
        self._work = work
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        # Its `put` is reentrant (docs.python.org, queue.SimpleQueue): a signal handler may interrupt one.
        self._wakes: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def wake(self) -> None:
        """Have the work done soon. Never raises, never waits."""
        if self._thread is None and self._starting.acquire(blocking=False):
            try:
                self._start()
            finally:
                self._starting.release()
        self._wakes.put(True)

    def _start(self) -> None:
        # The queue is made with the thread. Where gevent has patched them in between (a gunicorn worker that
        # was forked from a preloaded application), a greenlet would wait in a call that stops all others.
        self._wakes = queue.SimpleQueue()
        thread = threading.Thread(
            target=self._run, args=(self._wakes,), name="spool-housekeeping", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # the interpreter is ending, or has no thread left
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Wait for the work in hand and end the thread; the next `wake` starts another."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._wakes.put(False)
            thread.join(timeout=_STOP_SECONDS)

    def _run(self, wakes: queue.SimpleQueue[bool]) -> None:
        wait: float | None = 0.0
        while _go_on(wakes, wait):
            try:
                wait = self._work()
            except Exception:
                log.exception("housekeeping failed; trying again")
                wait = 1.0


def _go_on(wakes: queue.SimpleQueue[bool], wait: float | None) -> bool:
    """Sleep until there is work; False when the thread is to end."""
    try:
        return wakes.get(timeout=wait)
    except queue.Empty:
        return True
