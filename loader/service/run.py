"""One run over some files: groups their chunks into batches and tracks which files are fully loaded.

A file is loaded when it was read to its end and all its chunks are committed. Workers share a run: each takes
a batch, loads it, commits it, and retires the files that this finished. Reading happens under the lock, so
that chunks come in the order of the files; retiring, which may compress and sync, does not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from loader.files.chunk import Chunk
from loader.files.content import UNREADABLE, DamagedError
from loader.load.counts import Loaded
from loader.service.batches import Batch, FileProgress, batches


class Source(Protocol):
    """A file to load."""

    name: str

    def chunks(self, progressed: Callable[[], None]) -> Iterator[Chunk]:
        """Yield its lines. Raises UNREADABLE, after the complete lines before.

        `progressed` is called while a chunk takes long to read.
        """

    def retire(self, *, oversize: bool) -> None:
        """Handle that all of it is committed; `oversize` means a line was too long to be kept as a reject.

        Raises OSError.
        """

    def postpone(self) -> None:
        """Handle that some of it cannot be loaded at the moment."""


@dataclass
class Report:
    """What a run did; `failures` maps a file to why it was not loaded to its end, or not retired."""

    loaded: Loaded = field(default_factory=Loaded)
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)


class LoadRun:
    """The batches that are left of some files, and the report so far. Safe to use from any thread."""

    def __init__(self, sources: Iterable[Source], progressed: Callable[[], None] = lambda: None) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._progressed = progressed
        self._batches = batches(self._chunks(sources))
        self._divided: deque[Batch] = deque()
        """Parts of batches that could not be loaded as a whole."""
        self._finished: list[FileProgress] = []

    def take(self) -> Batch | None:
        """Return the next batch, None after the last."""
        with self._lock:
            return self._divided.popleft() if self._divided else next(self._batches, None)

    def give_up(self) -> None:
        """Leave the remaining batches unread."""
        with self._lock:
            self._divided.clear()
            self._batches = iter(())

    def postpone(self, batch: Batch, reason: str) -> None:
        """Leave the files of a batch to the next run."""
        with self._lock:
            for _, file in batch:
                self._postpone(file.source, reason)

    def set_aside(self, batch: Batch, reason: str) -> None:
        """Note that some chunks of a batch cannot be loaded at the moment.

        Their rejects cannot be written (on a full disk, loading the others is what frees space), or a row has
        no partition. So the batch is halved until these chunks are alone; their files stay, to be loaded the
        next time.
        """
        with self._lock:
            if len(batch) > 1:
                half = len(batch) // 2
                self._divided.extendleft([batch[half:], batch[:half]])  # so that the order of the files stays
                return
            ((_, file),) = batch
            self._postpone(file.source, f"waits: {reason}")

    def commit(self, batch: Batch, loaded: Loaded) -> None:
        """Note that a batch is committed."""
        with self._lock:
            self.report.loaded += loaded
            for _, file in batch:
                file.pending -= 1
                self._finish(file)

    def retire_finished(self) -> None:
        """Retire the files that are fully loaded by now."""
        with self._lock:
            finished, self._finished = self._finished, []
        for file in finished:
            try:
                file.source.retire(oversize=file.oversize)
            except OSError as error:
                self._fail(file.source, f"is loaded, but could not be removed: {error}")

    def _chunks(self, sources: Iterable[Source]) -> Iterator[tuple[Chunk, FileProgress]]:
        for source in sources:
            file = FileProgress(source)
            try:
                for chunk in source.chunks(self._progressed):
                    file.pending += 1
                    file.oversize |= chunk.oversize
                    yield chunk, file
            except DamagedError as error:
                self._postpone(source, f"could not be read to its end: {error}")
                continue
            except UNREADABLE as error:
                self._postpone(source, f"could not be read: {error}")
                continue
            file.read = True
            self._finish(file)

    def _finish(self, file: FileProgress) -> None:
        if file.read and not file.pending:
            self.report.files += 1
            self._finished.append(file)

    def _postpone(self, source: Source, reason: str) -> None:
        self._fail(source, reason)
        source.postpone()

    def _fail(self, source: Source, reason: str) -> None:
        self.report.failures[source.name] = reason
