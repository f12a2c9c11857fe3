"""Reads the last lines of a spool, and new lines as they are emitted, from sealed and open segments. Changes nothing.

A line of an open segment is shown once it is complete: the bytes after the last line are NUL. A followed
segment is held open, so that its lines are shown even if the loader has removed the file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from spool.record import MAX_LINE_BYTES, canonical_uuid
from spool.segment import OPEN, SEALED, SegmentName

Wanted = Callable[[bytes], bool]


def wanted(names: tuple[str, ...], user: str | None) -> Wanted:
    """Return a filter for lines by event type or metric name, and by user. Without either it accepts all lines."""
    user_id = None if user is None else canonical_uuid(user)

    def chosen(line: bytes) -> bool:
        if not names and user_id is None:
            return True
        record = _decoded(line)
        name = record.get("event_type", record.get("metric_name"))
        return (not names or name in names) and (user_id is None or record.get("user_id") == user_id)

    return chosen


def _decoded(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(orjson.JSONDecodeError):
        record = orjson.loads(line)
        if isinstance(record, dict):
            return record
    return {}


class Tail:
    """Follows a spool; each call of `new_lines` yields the lines written since the previous call."""

    def __init__(self, spool: Path, chosen: Wanted) -> None:
        self._spool = spool
        self._chosen = chosen
        self._files: dict[str, BinaryIO] = {}

    def last_lines(self, count: int) -> list[bytes]:
        """Return the current last lines of the spool, oldest first; `new_lines` continues after them."""
        found: list[bytes] = []
        stems = self._open_new()
        for stem in reversed(stems):
            lines = deque(filter(self._chosen, _lines(self._files[stem])), maxlen=max(0, count - len(found)))
            found = [*lines, *found]
        return found

    def new_lines(self) -> Iterator[bytes]:
        """Yield the complete lines written since the last call, segment by segment. Raises OSError."""
        present = self._open_new()
        for stem in sorted(self._files):
            yield from filter(self._chosen, _lines(self._files[stem]))
            if stem not in present:  # loaded
                self._files.pop(stem).close()

    def close(self) -> None:
        """Close the segments that are held open."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open_new(self) -> list[str]:
        """Open the segments not seen before. Returns the stems of all existing segments, oldest first."""
        stems = set()
        for entry in os.scandir(self._spool):
            path = Path(entry.path)
            if path.suffix not in (OPEN, SEALED) or SegmentName.parse(path.stem) is None:
                continue
            if path.stem in self._files or self._open(path):
                stems.add(path.stem)
        return sorted(stems)

    def _open(self, path: Path) -> bool:
        with contextlib.suppress(OSError):  # sealed or loaded in the meantime, a link, or not readable
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                self._files[path.stem] = file
                return True
            file.close()
        return False


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the complete lines after the last read position."""
    while True:
        begin = file.tell()
        line = file.readline(MAX_LINE_BYTES)
        if not line.endswith(b"\n") or b"\0" in line:
            file.seek(begin)
            return
        yield line
