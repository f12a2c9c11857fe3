"""One run over some files: groups their chunks into batches and tracks which files are fully loaded.

A file is loaded when it was read to its end and all its chunks are committed. Workers share a run: each takes
a batch, loads it, commits it, and retires the files that this finished. Reading happens under the lock, so
that chunks come in the order of the files; retiring, which may compress and sync, does not.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Protocol

import zstandard

from loader.files.chunk import CHUNK_BYTES, CHUNK_LINES, Chunk, chunks
from loader.load.counts import Loaded

BATCH_CHUNKS: Final = 256
"""Most small files that share a transaction."""
UNREADABLE: Final = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)
"""What reading a truncated or damaged file raises, also from a decompressor."""


class Source(Protocol):
    """A file to load."""

    name: str

    def open(self) -> BinaryIO:
        """Return the bytes of its lines. Raises OSError."""

    def retire(self, *, oversize: bool) -> None:
        """Handle that all of it is committed; `oversize` means a line was too long to be kept as a reject.

        Raises OSError.
        """


@dataclass
class Report:
    """What a run did; `failures` maps a file to why it was not loaded to its end, or not retired."""

    loaded: Loaded = field(default_factory=Loaded)
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class FileProgress:
    """A file that is being loaded: how many of its chunks are read but not committed."""

    source: Source
    pending: int = 0
    read: bool = False
    oversize: bool = False


Batch = list[tuple[Chunk, FileProgress]]


class LoadRun:
    """The batches that are left of some files, and the report so far. Safe to use from any thread."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._batches = self._read(sources)
        self._finished: list[FileProgress] = []

    def take(self) -> Batch | None:
        """Return the next batch, None after the last."""
        with self._lock:
            return next(self._batches, None)

    def give_up(self) -> None:
        """Leave the remaining batches unread."""
        with self._lock:
            self._batches = iter(())

    def postpone(self, batch: Batch, reason: str) -> None:
        """Leave the files of a batch to the next run."""
        with self._lock:
            for _, file in batch:
                self._fail(file.source, reason)

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

    def _read(self, sources: Iterable[Source]) -> Iterator[Batch]:
        batch: Batch = []
        room, lines = CHUNK_BYTES, CHUNK_LINES
        for chunk, file in self._chunks(sources):
            if batch and (chunk.size > room or chunk.line_count > lines or len(batch) == BATCH_CHUNKS):
                yield batch
                batch, room, lines = [], CHUNK_BYTES, CHUNK_LINES
            batch.append((chunk, file))
            room -= chunk.size
            lines -= chunk.line_count
        if batch:
            yield batch

    def _chunks(self, sources: Iterable[Source]) -> Iterator[tuple[Chunk, FileProgress]]:
        for source in sources:
            file = FileProgress(source)
            try:
                with source.open() as stream:
                    for chunk in chunks(stream, source.name):
                        file.pending += 1
                        file.oversize |= chunk.oversize
                        yield chunk, file
            except UNREADABLE as error:
                self._fail(source, f"could not be read: {error}")
                continue
            file.read = True
            self._finish(file)

    def _finish(self, file: FileProgress) -> None:
        if file.read and not file.pending:
            self.report.files += 1
            self._finished.append(file)

    def _fail(self, source: Source, reason: str) -> None:
        self.report.failures[source.name] = reason
