"""Reads a file by its content, whatever its name: decompresses it and converts UTF-16 to UTF-8.

    bytes --[gzip, zstd, bzip2, xz: any number of members, up to 4 layers]--> bytes --[UTF-16]--> lines

The end of a compressed stream may be followed by another member, by padding of zeros (gzip(1)), or by other
bytes. An error is raised only after all bytes before it were returned, so that the complete lines of a
truncated or damaged file are loaded. Memory is bounded even if a file expands a millionfold: a decompressor
returns at most about 32 MiB for one piece of its input.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Final, Protocol

import orjson
import zstandard

BOM: Final = codecs.BOM_UTF8
UNREADABLE: Final = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError, lzma.LZMAError)
"""Errors of reading a file, including those of decompressors."""
_PIECE: Final = 64 << 10
_ZSTD_PIECE: Final = 1 << 10
"""A zstd block of 4 bytes can expand to 128 KiB (RFC 8878, 3.1.1.2), and python-zstandard cannot stop within it."""
_LAYERS: Final = 4
_HEAD: Final = 64 << 10
"""The first line of a file must start within this number of bytes."""


class DamagedError(ValueError):
    """A stream that is truncated, damaged, or followed by other data."""


class NotLinesError(ValueError):
    """A file that does not hold one JSON object per line."""


class Reader:
    """A stream that can be peeked. `readinto` raises an error of the source after all bytes before it."""

    def __init__(self, fill: Callable[[memoryview], int], skip: Callable[[int], int] | None = None) -> None:
        self._fill = fill
        self._skip = skip
        self._ahead = memoryview(b"")
        self._error: Exception | None = None
        self.position = 0
        """Number of bytes read so far."""

    def readinto(self, view: memoryview) -> int:
        if self._ahead:
            size = min(len(view), len(self._ahead))
            view[:size] = self._ahead[:size]
            self._ahead = self._ahead[size:]
        elif self._error is not None:
            raise self._error
        else:
            size = self._fill(view)
        self.position += size
        return size

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, none at the end."""
        piece = bytearray(size)
        del piece[self.readinto(memoryview(piece)) :]
        return bytes(piece)

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer if there are no more."""
        ahead = bytearray(self._ahead)
        while len(ahead) < size and self._error is None:
            piece = bytearray(size - len(ahead))
            try:
                got = self._fill(memoryview(piece))
            except UNREADABLE as error:
                self._error = error
                break
            if not got:
                break
            ahead += piece[:got]
        self._ahead = memoryview(bytes(ahead))
        return bytes(ahead[:size])

    def put_back(self, data: bytes) -> None:
        self.position -= len(data)
        self._ahead = memoryview(data + bytes(self._ahead))

    def skip_hole(self, multiple: int) -> int:
        """Skip a hole of the file, in multiples of some bytes; return the number of zero bytes skipped."""
        if self._skip is None or self._ahead:
            return 0
        skipped = self._skip(multiple)
        self.position += skipped
        return skipped


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True)
class _Packing:
    """A compression format: the magic bytes of its members, and their decompressor."""

    name: str
    begins: tuple[bytes, ...]
    new: Callable[[], _Decompressor]
    piece: int = _PIECE

    def begins_with(self, head: bytes) -> bool:
        return head.startswith(self.begins)


class _Zlib:
    """A gzip member. Data decompressed before damage within the same piece is not lost."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(31)
        self._error: zlib.error | None = None

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, /) -> bytes:
        if self._error is not None:
            raise self._error
        before = self._inflate.copy()  # about 10 us, compared to 400 us for the piece
        data = self._inflate.unconsumed_tail + data
        try:
            return self._inflate.decompress(data, 16 * _PIECE)
        except zlib.error as error:
            self._error = error
            return _salvage(before, data)


def _salvage(inflate: zlib._Decompress, data: bytes) -> bytes:
    """Return the data that can be decompressed before the damage, byte by byte."""
    out = bytearray()
    try:
        while byte := inflate.decompress(data, 1):
            out += byte
            data = inflate.unconsumed_tail
    except zlib.error:
        pass
    return bytes(out)


class _Limited:
    """A bzip2 or xz stream. The output of a call is lost if its input is damaged; it is small."""

    def __init__(self, decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._decompressor = decompressor

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes, /) -> bytes:
        return self._decompressor.decompress(data, _PIECE // 4)


_PACKINGS: Final = (
    _Packing("gzip", (b"\x1f\x8b",), _Zlib),
    _Packing(
        "zstd",
        (b"\x28\xb5\x2f\xfd", *(bytes([kind]) + b"\x2a\x4d\x18" for kind in range(0x50, 0x60))),
        lambda: zstandard.ZstdDecompressor().decompressobj(),
        _ZSTD_PIECE,
    ),
    _Packing(
        "bzip2",
        tuple(b"BZh%d" % level for level in range(1, 10)),
        lambda: _Limited(bz2.BZ2Decompressor()),
    ),
    _Packing("xz", (b"\xfd7zXZ\x00",), lambda: _Limited(lzma.LZMADecompressor(memlimit=128 << 20))),
)
_PACKED_SUFFIXES: Final = (".gz", ".zst", ".zstd", ".bz2", ".xz")


class _Unpacked:
    """The bytes of all members of a compressed stream."""

    def __init__(self, source: Reader, packing: _Packing) -> None:
        self._source = source
        self._packing = packing
        self._member: _Decompressor | None = None
        self._out = memoryview(b"")

    def fill(self, view: memoryview) -> int:
        while not self._out:
            if self._member is None and not self._next_member():
                return 0
            self._out = memoryview(self._decompress())
        size = min(len(view), len(self._out))
        view[:size] = self._out[:size]
        self._out = self._out[size:]
        return size

    def _next_member(self) -> bool:
        """Start the next member; return whether there is one. Raises DamagedError if other data follows."""
        while (head := self._source.peek(8)) and not head.strip(b"\0"):
            self._source.read(len(head))
        head = head.lstrip(b"\0") if not self._packing.begins_with(head) else head
        if not head:
            return False
        if not self._packing.begins_with(self._source.peek(8)):
            raise DamagedError(
                f"its end is followed by {self._rest()} bytes that are not {self._packing.name}"
            )
        self._member = self._packing.new()
        return True

    def _rest(self) -> int:
        rest = 0
        while piece := self._source.read(_PIECE):
            rest += len(piece)
        return rest

    def _decompress(self) -> bytes:
        """Return more bytes, possibly none. Raises DamagedError."""
        assert self._member is not None  # a member was started
        data = self._source.read(self._packing.piece)
        try:
            out = self._member.decompress(data)
        except UNREADABLE as error:
            raise DamagedError(f"it is damaged ({self._packing.name}: {error})") from None
        if self._member.eof:
            self._source.put_back(self._member.unused_data)
            self._member = None
        elif not data and not out:
            raise DamagedError(f"it is truncated (the {self._packing.name} data has no end)")
        return out


class _Transcoded:
    """Converts UTF-16 to UTF-8. Lone surrogates are kept, so that their lines are rejected as not UTF-8."""

    def __init__(self, source: Reader, encoding: str) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._out = memoryview(b"")

    def fill(self, view: memoryview) -> int:
        while not self._out:
            data = self._source.read(_PIECE)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError:
                raise DamagedError("it is truncated (half a character of UTF-16 at its end)") from None
            if not data:
                return 0
            self._out = memoryview(text.encode("utf-8", "surrogatepass"))
        size = min(len(view), len(self._out))
        view[:size] = self._out[:size]
        self._out = self._out[size:]
        return size


def unpacked(stream: BinaryIO, skip_hole: Callable[[int], int] | None = None) -> Reader:
    """Return the decompressed bytes of a stream. Raises OSError."""
    reader = Reader(_filling(stream), skip_hole)
    for _ in range(_LAYERS):
        head = reader.peek(8)
        packing = next((packing for packing in _PACKINGS if packing.begins_with(head)), None)
        if packing is None:
            break
        reader = Reader(_Unpacked(reader, packing).fill)
    return reader


def lines_of(stream: BinaryIO, name: str) -> Reader:
    """Return the lines of a file named by the user.

    Raises NotLinesError if the file does not contain lines, DamagedError if it is empty but should be
    compressed, and OSError.
    """
    reader = unpacked(stream)
    head = reader.peek(4)
    if not head and name.endswith(_PACKED_SUFFIXES) and reader.peek(1) == b"":
        reader.readinto(memoryview(bytearray(1)))  # raises the error of the source
        raise DamagedError("it is empty, but its name is that of a compressed file")
    if head in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) or (len(head) == 4 and head.count(0) == 3):
        raise NotLinesError("it is UTF-32: convert it with `iconv -f utf-32 -t utf-8`")
    if head.startswith((codecs.BOM_UTF16_LE, b"{\0")):
        reader = Reader(_Transcoded(reader, "utf-16-le").fill)
    elif head.startswith((codecs.BOM_UTF16_BE, b"\0{")):
        reader = Reader(_Transcoded(reader, "utf-16-be").fill)
    if reason := _why_no_lines(reader.peek(_HEAD)):
        raise NotLinesError(reason)
    return reader


_MAGIC: Final = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"\x04\x22\x4d\x18": "compressed with lz4: unpack it with `lz4 -d`",
    b"\x1f\x9d": "compressed with compress(1): unpack it with `uncompress`",
    b"\x1f\xa0": "compressed with an old compressor: unpack it",
    b"]\0\0": "compressed with lzma: unpack it with `xz -d`",
    b"LZIP": "compressed with lzip: unpack it with `lzip -d`",
    b"\xff\x06\0\0sNaPpY": "compressed with snappy: unpack it",
    b"PAR1": "a Parquet file: export it as lines of JSON",
    b"Obj\x01": "an Avro file: export it as lines of JSON",
    b"PGDMP": "a dump of pg_dump: use `pg_restore`",
    b"SQLite format 3\0": "an SQLite database: export it as lines of JSON",
}


def _why_no_lines(head: bytes) -> str | None:
    """Return why a file that starts with `head` does not consist of lines of JSON objects, or None if it may."""
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return f"it is {what}"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it"
    lines = [line for each in head.split(b"\n") if (line := each.removeprefix(BOM).strip())]
    if not lines:
        return None
    if lines[0] == b"{":
        return "it has one object over several lines: convert it with `jq -c .`"
    if lines[0].startswith(b"[") and not (_is_json(lines[0]) and lines[1:] and lines[1].startswith(b"{")):
        return "it is a JSON array, not one object per line: convert it with `jq -c '.[]'`"
    if any(line.startswith(b"{") for line in lines):
        return None
    return "it is binary" if b"\0" in head or not _is_text(head) else "it has no line that is a JSON object"


def is_object(line: bytes) -> bool:
    """Whether a line without its newline is a whole JSON object; a truncated object never is."""
    return line.rstrip().endswith(b"}") and _is_json(line.removeprefix(BOM))


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _filling(stream: BinaryIO) -> Callable[[memoryview], int]:
    """Return the `readinto` of a stream, or a substitute that uses its `read`."""
    readinto: Callable[[memoryview], int] | None = getattr(stream, "readinto", None)
    if readinto is not None:
        return lambda view: readinto(view) or 0

    def fill(view: memoryview) -> int:
        data = stream.read(len(view))
        view[: len(data)] = data
        return len(data)

    return fill
