"""Prints emitted lines to standard error (`SPOOL_CONSOLE=1`), for development.

    12:00:00.123 memory_posted user_id=0190163d-... family_unit_id=0190163d-... {"memory_id":"7"}
    12:00:00.125 api_request_count counter 1 {"endpoint":"/","method":"GET","status":"200"}

Lines are written to the spool as usual and printed afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson

from spool.appender import Appender

_IDS = ("user_id", "family_unit_id", "session_id")


class ConsoleAppender(Appender):
    """An appender that also prints each line."""

    @property
    def write(self) -> Callable[[bytes], int]:
        return self._write_and_print

    @write.setter
    def write(self, write: Callable[[bytes], int]) -> None:
        self._write = write

    def _write_and_print(self, line: bytes) -> int:
        written = self._write(line)
        show(line)
        return written

    def append(self, line: bytes) -> None:
        """See `Appender.append`."""
        super().append(line)
        show(line)


def show(line: bytes) -> None:
    """Print a line to standard error. Never raises: the stream may be closed, or in use by interrupted code."""
    with suppress(Exception):
        sys.stderr.write(in_short(orjson.loads(line)) + "\n")


def in_short(record: dict[str, Any]) -> str:
    """Return an event or a metric as human-readable text."""
    time = str(record["timestamp"])[11:23]
    if "metric_name" in record:
        details = orjson.dumps(record["labels"]).decode()
        return f"{time} {record['metric_name']} {record['metric_type']} {record['value']} {details}"
    ids = "".join(f" {name}={record[name]}" for name in _IDS if record.get(name) is not None)
    return f"{time} {record['event_type']}{ids} {orjson.dumps(record['metadata']).decode()}"
