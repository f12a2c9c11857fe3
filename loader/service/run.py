"""One run over a set of files: groups their chunks into batches and tracks which files are fully loaded.

A file is loaded when it was read to its end and all its chunks are committed. Workers share a run: each takes
a batch, loads and commits it, and retires the files that this completed. Reading is done under the lock, so
that chunks are in the order of the files; retiring, which may compress and sync, is not.
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
    """A file to be loaded."""

    name: str

    def chunks(self, progressed: Callable[[], None]) -> Iterator[Chunk]:
        """Yield its chunks. Raises UNREADABLE, after the complete lines before the error.

        `progressed` is called while a chunk takes long to read.
        """

    def retire(self, *, oversize: bool) -> None:
        """Handle a fully committed file. `oversize`: a line was too long to be kept as a reject.

        Raises OSError.
        """

    def postpone(self) -> None:
        """Handle a file that cannot be loaded completely at the moment."""


@dataclass
class Report:
    """The result of a run. `failures` maps a file to the reason why it was not fully loaded, or not retired."""

    loaded: Loaded = field(default_factory=Loaded)
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)


class LoadRun:
    """The remaining batches of some files, and the report so far. Safe to use from any thread."""

    def __init__(self, sources: Iterable[Source], progressed: Callable[[], None] = lambda: None) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._progressed = progressed
        self._batches = batches(self._chunks(sources))
        self._divided: deque[Batch] = deque()
        """Halves of batches that could not be loaded as a whole."""
        self._finished: list[FileProgress] = []

    def take(self) -> Batch | None:
        """Return the next batch, None after the last."""
        with self._lock:
            return self._divided.popleft() if self._divided else next(self._batches, None)

    def give_up(self) -> None:
        """Abandon the remaining batches without reading them."""
        with self._lock:
            self._divided.clear()
            self._batches = iter(())

    def postpone(self, batch: Batch, reason: str) -> None:
        """Postpone the files of a batch to the next run."""
        with self._lock:
            for _, file in batch:
                self._postpone(file.source, reason)

    def set_aside(self, batch: Batch, reason: str) -> None:
        """Record that some chunks of a batch cannot be loaded at the moment.

        Either their rejects cannot be written (on a full disk, loading the others frees space), or a row has
        no partition. The batch is halved until these chunks are isolated; their files are loaded the next
        time.
        """
        with self._lock:
            if len(batch) > 1:
                half = len(batch) // 2
                self._divided.extendleft([batch[half:], batch[:half]])  # keeps the order of the files
                return
            ((_, file),) = batch
            self._postpone(file.source, f"waits: {reason}")

    def commit(self, batch: Batch, loaded: Loaded) -> None:
        """Record that a batch is committed."""
        with self._lock:
            self.report.loaded += loaded
            for _, file in batch:
                file.pending -= 1
                self._finish(file)

    def retire_finished(self) -> None:
        """Retire all files that are fully loaded."""
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
