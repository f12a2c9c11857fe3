"""Which bytes: a stream cut into chunks of whole lines, each with its place and the digest of its bytes.

The same bytes always give the same chunks, so the ledger knows a file again that was copied or renamed. A
line longer than a chunk becomes a chunk of its own that holds only its head: memory stays bounded whatever
the file, and the line is rejected with its length.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Final, cast

CHUNK_BYTES: Final = 4 << 20
"""Some 10,000 events, a quarter of a second of a server's work: a transaction's fixed cost is nothing beside
that. A worker needs a few times this in memory."""
CHUNK_LINES: Final = 1 << 16
"""Twice what a chunk of events has: each line of a chunk may become a reject, some 600 bytes of memory."""
_FIRST_BYTES: Final = 64 << 10
"""What the first read of a file makes room for: most segments are small."""
HEAD_BYTES: Final = 1024


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file. `data` is all of them, or the head of one line that is `oversize`."""

    file: str
    offset: int
    size: int
    first_line: int
    line_count: int
    data: bytes | bytearray
    oversize: bool = False
    given_digest: bytes = b""
    """Of an oversize line, whose bytes are not kept."""

    @cached_property
    def digest(self) -> bytes:
        """What the ledger knows these bytes by. Made when it is asked for, so by several workers at once."""
        return self.given_digest or hashlib.sha256(self.data).digest()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines without their newlines."""
        return (line.removesuffix(b"\n") for line in io.BytesIO(self.data))


def chunks(stream: BinaryIO, file: str, limit: int = CHUNK_BYTES, most: int = CHUNK_LINES) -> Iterator[Chunk]:
    """Yield the chunks of a binary stream from its current place. Raises OSError."""
    offset, line, rest, expected = 0, 1, b"", _FIRST_BYTES
    while data := _read(stream, rest, expected, limit):
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) >= limit:
            chunk, rest = _oversize(stream, file, offset, line, bytes(data), limit)
        else:
            whole = _after_lines(data, most) or whole or len(data)  # the last line may lack its newline
            rest = bytes(data[whole:])
            del data[whole:]
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            chunk = Chunk(file, offset, len(data), line, count, data)
        line += chunk.line_count
        yield chunk
        offset += chunk.size
        expected = limit


def _after_lines(data: bytearray, most: int) -> int:
    """Return the offset after the `most`-th line, 0 where there are no more."""
    if data.count(b"\n") <= most:
        return 0
    end = 0
    for _ in range(most):
        end = data.find(b"\n", end) + 1
    return end


def _read(stream: BinaryIO, begin: bytes, expected: int, limit: int) -> bytearray:
    """Return `begin` and what follows, up to `limit` bytes. In place: a copy costs more than the read."""
    reader = cast(io.BufferedIOBase, stream)  # as every binary stream of the standard library is
    data = bytearray(min(limit, max(expected, len(begin))))
    data[: len(begin)] = begin
    end = len(begin)
    while True:
        with memoryview(data) as view:
            while end < len(data) and (got := reader.readinto(view[end:])):
                end += got
        if end < len(data) or end == limit:
            break
        data.extend(bytes(min(limit - end, 3 * end)))
    del data[end:]
    return data


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
    return Chunk(file, offset, size, line, 1, head, oversize=True, given_digest=digest.digest()), rest
