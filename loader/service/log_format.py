"""Formats log lines: text on a terminal, otherwise one JSON object each, with a priority for systemd's journal.

Control characters are always escaped.
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
    """Logs to the current `sys.stderr`: a progress bar replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return journal.prefix(record.levelno) + super().format(record)


class _Readable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def to_stderr(level: int = logging.INFO) -> None:
    """Log to standard error: the loader's messages from a level on, and warnings of its libraries."""
    handler = _ToStderr()
    handler.setFormatter(
        _Readable("%(asctime)s %(levelname)s %(message)s") if sys.stderr.isatty() else _json()
    )
    logging.basicConfig(handlers=[handler])
    logging.getLogger("loader").setLevel(level)


def _json() -> logging.Formatter:
    """Return a JSON formatter: in ASCII, so that all control characters are escaped, with times in UTC."""
    formatter = JsonFormatter(
        "%(asctime)s %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%SZ", rename_fields=_FIELDS
    )
    formatter.converter = time.gmtime
    return formatter
