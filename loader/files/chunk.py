"""Splits a stream into chunks of whole lines, each with its offset and the digest of its bytes.

The same bytes always yield the same chunks, so the ledger recognizes a file that was copied or renamed. A
line longer than a chunk becomes a chunk of its own that holds only its head. So memory is bounded for any
file, and the line is rejected with its length.

A read error is raised after the complete lines before it, so those lines of a truncated file are loaded.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Final, Protocol, cast

from loader.files.content import BOM, UNREADABLE, Reader, is_object
from loader.files.limits import CHUNK_BYTES, CHUNK_LINES

_FIRST_BYTES: Final = 64 << 10
"""Buffer size of the first read of a file: most segments are small."""
HEAD_BYTES: Final = 1024


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file. `data` has all of them, or only the head of one `oversize` line."""

    file: str
    offset: int
    size: int
    first_line: int
    line_count: int
    data: bytes | bytearray
    oversize: bool = False
    given_digest: bytes = b""
    """The digest of an oversize line, whose bytes are not kept."""
    again: bool = False
    """Load the chunk even if the ledger has its digest."""
    keep_expired: bool = False
    """Load lines below the low-water mark, too."""

    @cached_property
    def digest(self) -> bytes:
        """The key of these bytes in the ledger. Computed on first use, so that workers compute in parallel."""
        return self.given_digest or hashlib.sha256(self.data).digest()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines without their newlines and without a byte-order mark."""
        lines = (line.removesuffix(b"\n") for line in io.BytesIO(self.data))
        # Its first byte, which few lines contain, is found ten times as fast as all three.
        has_mark = BOM[:1] in self.data and BOM in self.data
        return (line.removeprefix(BOM) for line in lines) if has_mark else lines


class Stream(Protocol):
    """A stream of bytes to be split into chunks."""

    def readinto(self, view: memoryview, /) -> int | None: ...


@dataclass(frozen=True)
class Reading:
    """Options for reading a file."""

    cuts: Sequence[int] = ()
    """Offsets at which a chunk must end: the sizes of the file when it was loaded before. So the lines loaded
    then form the same chunks again, which the ledger recognizes."""
    growing: bool = False
    """Whether the file may still be written: a last line without a newline is then left for the next load."""
    again: bool = False
    """Whether to load chunks that the ledger already has."""
    keep_expired: bool = False
    """Whether to load lines below the low-water mark."""
    progressed: Callable[[], None] = lambda: None
    """Called for each piece of a long line."""


WHOLE_FILE: Final = Reading()


def chunks(
    stream: Stream | BinaryIO, file: str, limit: int = CHUNK_BYTES, most: int = CHUNK_LINES,
    reading: Reading = WHOLE_FILE,
) -> Iterator[Chunk]:  # fmt: skip
    """Yield the chunks of a stream from its current position. Raises UNREADABLE, after the complete lines."""
    source = _Source(stream)
    offset, line, rest, expected = 0, 1, b"", _FIRST_BYTES
    while data := _read(source, rest, expected, limit, _until_cut(reading, offset, rest)):
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) >= limit:
            chunk, rest = _oversize(source, file, offset, line, data, limit, reading)
            if source.ended and not rest and _is_cut_off(source, b"", reading) and not source.at_newline:
                break
        else:
            if whole < len(data) and _is_cut_off(source, data[whole:], reading):
                del data[whole:]
                if not data:
                    break
            whole = _after_lines(data, most) or whole or len(data)  # the last line may lack a newline
            rest = bytes(data[whole:])
            del data[whole:]
            count = data.count(b"\n") + (not data.endswith(b"\n"))
            chunk = Chunk(
                file,
                offset,
                len(data),
                line,
                count,
                data,
                again=reading.again,
                keep_expired=reading.keep_expired,
            )
        line += chunk.line_count
        yield chunk
        offset += chunk.size
        expected = limit
    if source.error is not None:
        raise source.error


class _Source:
    """A stream that remembers its end and the error of reading it."""

    def __init__(self, stream: Stream | BinaryIO) -> None:
        self.ended = False
        self.at_newline = False
        """Whether the last long line ended with a newline."""
        self.error: Exception | None = None
        self._stream = cast(
            Stream, stream
        )  # binary streams of the standard library have it, although BinaryIO does not declare it

    def fill(self, view: memoryview) -> int:
        """Fill the view and return the number of bytes, fewer than its size at the end."""
        end = 0
        while end < len(view) and not self.ended:
            with (
                view[end:] as part
            ):  # released, because an exception keeps its frames, and a view blocks resizing its buffer
                try:
                    got = self._stream.readinto(part) or 0
                except UNREADABLE as error:
                    self.error, got = error, 0
            self.ended = not got
            end += got
        return end

    def skip_hole(self, multiple: int) -> int:
        return self._stream.skip_hole(multiple) if isinstance(self._stream, Reader) else 0


def _until_cut(reading: Reading, offset: int, rest: bytes) -> int | None:
    """Return the number of bytes up to the next cut, if there is one."""
    return next((cut - offset for cut in reading.cuts if cut > offset + len(rest)), None)


def _is_cut_off(source: _Source, last: bytes | bytearray, reading: Reading) -> bool:
    """Whether to omit a last line without a newline, because it may be incomplete."""
    if not source.ended:
        return False
    return source.error is not None or (reading.growing and not is_object(bytes(last)))


def _after_lines(data: bytearray, most: int) -> int:
    """Return the offset after line number `most`, or 0 if there are no more lines than that."""
    if data.count(b"\n") <= most:
        return 0
    end = 0
    for _ in range(most):
        end = data.find(b"\n", end) + 1
    return end


def _read(source: _Source, begin: bytes, expected: int, limit: int, cut: int | None) -> bytearray:
    """Return `begin` and the bytes that follow, up to `limit` bytes, or to the cut if a line ends there.

    Reads in place: a copy would take longer than the read.
    """
    upto = limit if cut is None else min(cut, limit)
    data = bytearray(min(upto, max(expected, len(begin))))
    data[: len(begin)] = begin
    end = len(begin)
    while True:
        with memoryview(data) as view, view[end:] as room:
            end += source.fill(room)
        if end < len(data):
            break
        if end == upto:
            if upto == limit or data.endswith(b"\n"):
                break
            upto = limit  # the lines differ from those loaded before
        data.extend(bytes(min(upto - end, 3 * end)))
    del data[end:]
    return data


def _oversize(
    source: _Source, file: str, offset: int, line: int, data: bytearray, limit: int, reading: Reading
) -> tuple[Chunk, bytes]:
    """Read to the end of a line that starts with `data`; return its chunk and the bytes read beyond it.

    Blocks of zeros are counted, not hashed, and holes are not even read, so a sparse file of 30 GiB takes no
    time.
    """
    digest, size, zeros, head, rest = hashlib.sha256(), 0, 0, bytes(data[:HEAD_BYTES]), b""
    source.at_newline = False
    while data:
        reading.progressed()
        end = data.find(b"\n") + 1
        with memoryview(data) as view:
            used = view[: end or len(data)]
            size += len(used)
            if len(used) == limit and not data.strip(b"\0"):
                zeros += limit
            else:
                digest.update(_counted(zeros))
                digest.update(used)
                zeros = 0
            used.release()
        if end:
            source.at_newline, rest = True, bytes(data[end:])
            break
        skipped = source.skip_hole(limit)
        size, zeros = size + skipped, zeros + skipped
        data = _read(source, b"", limit, limit, None)
    digest.update(_counted(zeros))
    return Chunk(
        file, offset, size, line, 1, head, oversize=True, given_digest=digest.digest(), again=reading.again
    ), rest


def _counted(zeros: int) -> bytes:
    return b"%d zeros" % zeros if zeros else b""
