"""The account of a writer: its counts in a file that survives SIGKILL, `.writers/<writer>` in the spool.

The loader compares the account with the ledger and the spool, which together must contain every segment and
line that was written. It also reports the drops that the writer had not reported as metrics before it died.

    bytes   content
    0-15    MAGIC, written last
    16      when the writer started counting, in milliseconds since 1970
    24, 32  sealed segments before the first unsealed one, and their lines
    40, 48  the same; the pair with more segments is valid, the other is overwritten next
    56      the number of the last segment that received a line
    64      drops of kinds without an entry
    128...  entries of 160 bytes: dropped, announced, reported; then cause, space, name, NUL bytes

Each number has 64 bits in the byte order of the host and is replaced by one store, so a killed process leaves
either the old value or the new one. An entry's text is written before its numbers. A metric that reports
drops is announced first. Its event_id depends only on the writer and on the drops reported before it, so the
loader builds the same line from an announcement without a report; if the writer did write that line, the
loader's copy is a duplicate.

The loader creates the directory `.writers`. Until a loader has run, it does not exist and writers keep no account. A
running writer holds a lock (flock) on its file. If a file cannot be mapped safely, the housekeeping thread
writes it, and drops since its last write are lost when the process is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import orjson

from spool import kernel
from spool.drops import OTHER, Drops, Kind, Report
from spool.metric_names import DROPPED_METRIC
from spool.open_segment import HeldFile
from spool.segment import FILE_MODE, is_file

if TYPE_CHECKING:
    from spool.appender import SealedSoFar

DIRECTORY: Final = ".writers"
MAGIC: Final = b"spool writer 1\n\0"
BYTES: Final = 1 << 16
_WORD: Final = 8
_BEGAN, _PAIRS, _BEGUN, _WITHOUT_ENTRY = 2, (3, 5), 7, 8
_FIRST_ENTRY: Final = 128
_ENTRY: Final = 160
_NUMBERS: Final = 3 * _WORD
_LAST_NAMED: Final = BYTES - 32 * _ENTRY
"""Entries from this offset on are reserved for causes whose names have no entry of their own."""
_RETRY_SECONDS: Final = 1.0
_LOCK_ATTEMPTS: Final = 20
_LOCK_SECONDS: Final = 0.002


class Account:
    """The account file of this process.

    Changed by the thread that drops a line, under the lock of `Drops`, and by housekeeping.
    """

    def __init__(self, spool: Path, writer: str) -> None:
        self.writer = writer
        self.began = time.time_ns() // 1_000_000
        self._path = spool / DIRECTORY / writer
        self._retry_at = 0.0
        self._file: HeldFile | None = None
        self._memory: mmap.mmap | bytearray = bytearray()
        self._words: memoryview | None = None
        self._entries: dict[Kind, int] = {}
        self._end = _FIRST_ENTRY

    # ---- called by housekeeping ---------------------------------------------------------------------

    def update(self, sealed: SealedSoFar, drops: Drops) -> None:
        """Write the current counts. Creates the file once there is something to write. Never raises."""
        if self._words is None and (sealed.begun or drops.by_kind()):
            self._open(drops)
        if (words := self._words) is not None:
            first, second = _PAIRS
            older = first if words[first] <= words[second] else second
            if words[first + second - older] < sealed.segments:
                words[older + 1] = sealed.lines
                words[older] = sealed.segments
            words[_BEGUN] = sealed.begun
            self._flush()

    def announce(self, report: Report) -> None:
        """Record that a metric is about to report drops."""
        self._set(report.kind, 1, report.end)

    def reported(self, report: Report) -> None:
        """Record that a metric has reported drops."""
        self._set(report.kind, 2, report.end)

    def _set(self, kind: Kind, place: int, value: int) -> None:
        if self._words is not None and kind in self._entries:
            self._words[self._entries[kind] // _WORD + place] = value
            self._flush()

    def close(self, sealed: SealedSoFar, drops: Drops) -> None:
        """Write the final counts. Release the file to the loader unless unreported drops remain."""
        self.update(sealed, drops)
        if not drops.is_waiting():
            drops.count_in(None)
            self.abandon()

    def abandon(self) -> None:
        """Release the file and its lock without changing them, as a forked child does."""
        words, self._words = self._words, None
        if words is not None:
            words.release()
            if isinstance(self._memory, mmap.mmap):
                self._memory.close()
        if self._file is not None:
            self._file.close()

    def _open(self, drops: Drops) -> None:
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        with contextlib.suppress(OSError):
            self._file = HeldFile(_opened(self._path))
            try:
                self._map(self._file.held())
            except BaseException:
                self._file.close()
                raise
            self._entries, self._end = {}, _FIRST_ENTRY
            drops.count_in(self)

    def _map(self, fd: int) -> None:
        """Raises OSError."""
        kernel.share(fd, self._path.parent, FILE_MODE)
        _lock(fd)
        if not is_file(self._path, fd):
            raise FileNotFoundError
        if kernel.overwrites_in_place(fd):
            kernel.reserve(fd, BYTES)
            self._memory = kernel.map_file(fd, BYTES)
        else:
            self._memory = bytearray(BYTES)
        self._memory[:] = bytes(BYTES)
        self._words = memoryview(self._memory).cast("Q")
        self._words[_BEGAN] = self.began
        self._memory[: len(MAGIC)] = MAGIC

    def _flush(self) -> None:
        if isinstance(self._memory, bytearray) and self._file is not None:
            with contextlib.suppress(OSError):
                kernel.write_at(self._file.held(), bytes(self._memory), 0)

    # ---- called by the thread that drops a line -----------------------------------------------------

    def count(self, kind: Kind, dropped: Mapping[Kind, int], reported: Mapping[Kind, int]) -> None:
        """Write how many lines of a kind were dropped and how many of these were reported."""
        words = self._words
        if words is None:
            return
        with contextlib.suppress(ValueError):  # closed in the meantime
            if kind not in self._entries and not self._add_entry(kind):
                words[_WITHOUT_ENTRY] += 1
                return
            at = self._entries[kind] // _WORD
            words[at] = dropped[kind]
            words[at + 2] = reported.get(kind, 0)

    def _add_entry(self, kind: Kind) -> bool:
        if self._end + _ENTRY > (BYTES if kind.name == OTHER else _LAST_NAMED):
            return False
        text = f"{kind.cause} {kind.name}".encode()[: _ENTRY - _NUMBERS]
        start = self._end + _NUMBERS
        self._memory[start : start + len(text)] = text
        self._entries[kind] = self._end
        self._end += _ENTRY
        return True


def _lock(fd: int) -> None:
    """Take the lock. A loader that checks whether the writer is alive holds it for some microseconds."""
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            kernel.lock(fd)
            return
        time.sleep(_LOCK_SECONDS)
    kernel.lock(fd)


def _opened(path: Path) -> int:
    """Return a descriptor of a new file, or of this writer's file from before its last `close`."""
    try:
        return os.open(path, kernel.NEW_FILE, FILE_MODE)
    except FileExistsError:
        fd = os.open(path, os.O_RDWR | kernel.EXISTING_FILE)
        status = os.fstat(fd)
        if status.st_nlink != 1 or (sys.platform != "win32" and status.st_uid != os.geteuid()):
            os.close(fd)
            raise
        return fd


# ---- reading ----------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """The decoded account of a writer."""

    writer: str
    began: int
    segments: int
    lines: int
    begun: int
    dropped: int
    unreported: Sequence[Report]


def decode(writer: str, data: bytes) -> Statement | None:
    """Return the contents of a writer's file, or None if it is incomplete."""
    if len(data) != BYTES or not data.startswith(MAGIC):
        return None
    words = memoryview(data).cast("Q")
    segments, lines = max((words[pair], words[pair + 1]) for pair in _PAIRS)
    dropped, unreported = words[_WITHOUT_ENTRY], []
    for start in range(_FIRST_ENTRY, BYTES - _ENTRY + 1, _ENTRY):
        count, announced, reported = words[start // _WORD : start // _WORD + 3]
        cause, _, name = (
            data[start + _NUMBERS : start + _ENTRY].rstrip(b"\0").decode("ascii", "replace").partition(" ")
        )
        dropped += count
        ends = sorted({reported, *(end for end in (announced, count) if end > reported)})
        unreported += [Report(Kind(cause, name), *pair) for pair in pairwise(ends)]
    return Statement(writer, words[_BEGAN], segments, lines, words[_BEGUN], dropped, unreported)


def report_line(writer: str, began: int, report: Report) -> bytes:
    """Return the line of the metric that reports drops. Its id depends only on what it reports."""
    kind, begin, end = report
    digest = sha256(f"{writer} {kind.cause} {kind.name} {begin}".encode()).hexdigest()
    moment = f"{began:012x}"
    event_id = f"{moment[:8]}-{moment[8:]}-7{digest[:3]}-8{digest[3:6]}-{digest[6:18]}"
    micros = time.time_ns() // 1000
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(micros // 1_000_000))
    return orjson.dumps(
        {
            "event_id": event_id, "metric_name": DROPPED_METRIC, "metric_type": "counter", "value": end - begin,
            "labels": {"cause": kind.cause, "name": kind.name}, "timestamp": f"{seconds}.{micros % 1_000_000:06d}Z",
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )  # fmt: skip


def as_reported(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the byte offsets and numbers to write to a file so that all its drops count as reported."""
    words = memoryview(data).cast("Q")
    for start in range(_FIRST_ENTRY, BYTES - _ENTRY + 1, _ENTRY):
        if words[start // _WORD] > words[start // _WORD + 2]:
            yield start + 2 * _WORD, words[start // _WORD]
