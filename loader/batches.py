"""What is loaded at once: files read one by one into batches of chunks, and which files are done.

A file is done when all its chunks are committed, whoever loaded them.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Final, Protocol

import zstandard

from loader.chunk import CHUNK_BYTES, CHUNK_LINES, Chunk, chunks
from loader.load import Tally

BATCH_CHUNKS: Final = 256
"""Small files that share a transaction at most."""
UNREADABLE: Final = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)
"""What reading a file that is cut short or damaged raises, also from a decompressor."""


class Source(Protocol):
    """A file to load."""

    name: str

    def open(self) -> BinaryIO:
        """Return the bytes of its lines. Raises OSError."""

    def done(self, *, oversize: bool) -> None:
        """All of it is committed; `oversize` tells that a line was too long to be kept as a reject."""


@dataclass
class Report:
    """What a pass over some files did; `failures` maps the file that could not be read to why."""

    tally: Tally = field(default_factory=Tally)
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class _Reading:
    """A file of which some chunks are not committed, or not read yet."""

    source: Source
    pending: int = 0
    whole: bool = False
    oversize: bool = False


Batch = list[tuple[Chunk, _Reading]]


class Pass:
    """One pass over some files: the batches that are left, and the files that are not done."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.report = Report()
        self._lock = threading.Lock()
        self._batches = self._read(sources)

    def take(self) -> Batch | None:
        with self._lock:
            return next(self._batches, None)

    def give_up(self) -> None:
        with self._lock:
            self._batches = iter(())

    def committed(self, batch: Batch, tally: Tally) -> None:
        with self._lock:
            self.report.tally += tally
            for _, reading in batch:
                reading.pending -= 1
                self._finish(reading)

    def _read(self, sources: Iterable[Source]) -> Iterator[Batch]:
        batch: Batch = []
        room, lines = CHUNK_BYTES, CHUNK_LINES
        for chunk, reading in self._chunks(sources):
            if batch and (chunk.size > room or chunk.line_count > lines or len(batch) == BATCH_CHUNKS):
                yield batch
                batch, room, lines = [], CHUNK_BYTES, CHUNK_LINES
            batch.append((chunk, reading))
            room -= chunk.size
            lines -= chunk.line_count
        if batch:
            yield batch

    def _chunks(self, sources: Iterable[Source]) -> Iterator[tuple[Chunk, _Reading]]:
        for source in sources:
            reading = _Reading(source)
            try:
                with source.open() as stream:
                    for chunk in chunks(stream, source.name):
                        reading.pending += 1
                        reading.oversize |= chunk.oversize
                        yield chunk, reading
            except UNREADABLE as error:
                self._fail(source, f"can't be read: {error}")
                continue
            reading.whole = True
            self._finish(reading)

    def _finish(self, reading: _Reading) -> None:
        if reading.whole and not reading.pending:
            self.report.files += 1
            try:
                reading.source.done(oversize=reading.oversize)
            except OSError as error:
                self._fail(reading.source, f"is loaded, but can't be removed: {error}")

    def _fail(self, source: Source, why: str) -> None:
        self.report.failures[source.name] = why
