"""Log lines: for people on a terminal, else one JSON object each, with its priority in systemd's journal.

No byte of them steers a terminal.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Final, TextIO

from pythonjsonlogger.json import JsonFormatter

from loader.errors import one_line
from loader.service import journal

_FIELDS: Final = {"asctime": "timestamp", "levelname": "level", "name": "logger"}


class _ToStderr(logging.StreamHandler[TextIO]):
    """To standard error as it is now: a progress bar puts something in its place to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return journal.prefix(record.levelno) + super().format(record)


class _Readable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def to_stderr(level: int = logging.INFO) -> None:
    """Send what the loader logs from a level on, and warnings of its libraries, to standard error."""
    handler = _ToStderr()
    handler.setFormatter(
        _Readable("%(asctime)s %(levelname)s %(message)s") if sys.stderr.isatty() else _json()
    )
    logging.basicConfig(handlers=[handler])
    logging.getLogger("loader").setLevel(level)


def _json() -> logging.Formatter:
    """In ASCII, so that control characters of any kind are escaped; times in UTC."""
    formatter = JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ", rename_fields=_FIELDS
    )
    formatter.converter = time.gmtime
    return formatter
