"""Groups chunks of files into batches; a batch is loaded in one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loader.files.chunk import Chunk
from loader.files.limits import CHUNK_BYTES, CHUNK_LINES

if TYPE_CHECKING:
    from loader.service.run import Source

BATCH_CHUNKS: Final = 256
"""Maximum number of files in one transaction."""


@dataclass(eq=False)
class FileProgress:
    """The progress of loading a file: how many of its chunks are read but not committed."""

    source: Source
    pending: int = 0
    read: bool = False
    oversize: bool = False


Batch = list[tuple[Chunk, FileProgress]]


def batches(chunks: Iterable[tuple[Chunk, FileProgress]]) -> Iterator[Batch]:
    """Yield batches, each at most as large as the largest chunk and of a limited number of files."""
    batch: Batch = []
    room, lines = CHUNK_BYTES, CHUNK_LINES
    for chunk, file in chunks:
        if batch and (chunk.size > room or chunk.line_count > lines or len(batch) == BATCH_CHUNKS):
            yield batch
            batch, room, lines = [], CHUNK_BYTES, CHUNK_LINES
        batch.append((chunk, file))
        room -= chunk.size
        lines -= chunk.line_count
    if batch:
        yield batch
