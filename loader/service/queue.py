"""The batches of a run, shared by its workers.

At most one worker holds a batch. A worker that cannot load its batch at the moment returns it, so that
another one takes it; a worker without work waits for batches returned by others. If Postgres refuses every
row of a batch, the batch is postponed to the next run, and the other batches continue. If that happens to all
batches, or if Postgres refuses every insert, the configuration is at fault.
"""

from __future__ import annotations

import threading
from collections import deque

import psycopg

from loader.errors import LoaderError
from loader.load.counts import Loaded
from loader.load.isolate import AllRefusedError
from loader.service.batches import Batch
from loader.service.run import LoadRun


class BatchQueue:
    """A queue of batches. Safe to use from any thread."""

    def __init__(self, run: LoadRun) -> None:
        self.refusal: psycopg.Error | LoaderError | None = None
        """Set if the configuration is at fault."""
        self._run = run
        self._changed = threading.Condition()
        self._waiting: deque[Batch] = deque()
        """Returned batches, and one read ahead."""
        self._in_hand = 0
        self._committed = False
        self._ended = False

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds` until a batch is available. Return whether one is."""
        with self._changed:
            if not self._is_waiting() and not self._is_done():
                self._changed.wait(seconds)
            return self._is_waiting()

    def done(self) -> bool:
        """Whether all batches are loaded or postponed."""
        with self._changed:
            return not self._is_waiting() and self._is_done()

    def take(self) -> Batch | None:
        """Return a batch, or None if none is available."""
        with self._changed:
            if not self._is_waiting():
                return None
            self._in_hand += 1
            return self._waiting.popleft()

    def give_back(self, batch: Batch) -> None:
        """Return an unloaded batch, so that another worker takes it."""
        with self._changed:
            self._waiting.appendleft(batch)
            self._put_down()

    def commit(self, batch: Batch, loaded: Loaded) -> None:
        """Record that a batch is committed, and retire the files that this completed."""
        with self._changed:
            self._committed = True
            if not self._ended:
                self.refusal = None
            self._run.commit(batch, loaded)
            self._put_down()
        self._run.retire_finished()

    def postpone(self, batch: Batch, error: psycopg.Error | LoaderError, reason: str) -> None:
        """Record that all rows of a batch or its ledger rows were refused, or that nothing can be inserted."""
        with self._changed:
            self._run.postpone(batch, f"waits: {reason}")
            every_batch = isinstance(error, psycopg.Error) and not isinstance(
                error.__cause__, AllRefusedError
            )
            if every_batch or not self._committed:
                self.refusal = error
            if every_batch:
                self._end()
            self._put_down()

    def set_aside(self, batch: Batch, reason: str) -> None:
        """Record that some chunks of a batch cannot be loaded at the moment; see `LoadRun.set_aside`."""
        with self._changed:
            self._run.set_aside(batch, reason)
            self._put_down()

    def give_up(self) -> None:
        """Abandon the remaining batches."""
        with self._changed:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._waiting.clear()
        self._run.give_up()
        self._changed.notify_all()

    def _put_down(self) -> None:
        self._in_hand -= 1
        if self._ended:
            self._waiting.clear()
        self._changed.notify_all()

    def _is_waiting(self) -> bool:
        if not self._waiting and not self._ended and (batch := self._run.take()):
            self._waiting.append(batch)
        return bool(self._waiting)

    def _is_done(self) -> bool:
        return not self._in_hand
