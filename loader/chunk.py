"""Which bytes: a stream cut into chunks of whole lines, each with its place and the digest of its bytes.

The same bytes always give the same chunks, so the ledger knows a file again that was copied or renamed. A
line longer than a chunk becomes a chunk of its own that holds only its head: memory stays bounded whatever
the file, and the line is rejected with its length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

CHUNK_BYTES: Final = 8 << 20
"""Some 20,000 events: long enough that a transaction's fixed cost is nothing, short enough for memory."""
HEAD_BYTES: Final = 1024


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file. `data` is all of them, or the head of one line that is `oversize`."""

    file: str
    offset: int
    size: int
    first_line: int
    digest: bytes
    data: bytes
    oversize: bool = False

    def lines(self) -> list[bytes]:
        """Return the lines without their newlines."""
        lines = self.data.split(b"\n")
        if not self.oversize and not lines[-1]:
            lines.pop()
        return lines


def chunks(stream: BinaryIO, file: str, limit: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the chunks of a binary stream from its current place. Raises OSError."""
    offset, line, rest = 0, 1, b""
    while data := rest + stream.read(limit - len(rest)):
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) >= limit:
            chunk, rest = _oversize(stream, file, offset, line, data, limit)
            line += 1
        else:
            whole = whole or len(data)  # the last line of a file may lack its newline
            data, rest = data[:whole], data[whole:]
            chunk = Chunk(file, offset, len(data), line, hashlib.sha256(data).digest(), data)
            line += data.count(b"\n")
        yield chunk
        offset += chunk.size


def _oversize(
    stream: BinaryIO, file: str, offset: int, line: int, data: bytes, limit: int
) -> tuple[Chunk, bytes]:
    """Read to the end of a line that began with `data`; return its chunk and what was read beyond it."""
    digest, size, head = hashlib.sha256(), 0, data[:HEAD_BYTES]
    end = 0
    while data and not end:
        end = data.find(b"\n") + 1
        used = end or len(data)
        digest.update(data[:used])
        size += used
        rest = data[used:]
        data = b"" if end else stream.read(limit)
    return Chunk(file, offset, size, line, digest.digest(), head, oversize=True), rest
