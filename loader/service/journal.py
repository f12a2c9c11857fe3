"""Priority prefixes for lines that systemd's journal reads from standard error, such as `<6>` (sd-daemon(3))."""

from __future__ import annotations

import functools
import logging
import os
from typing import Final

_STDERR: Final = 2
_PRIORITIES: Final = (
    (logging.CRITICAL, "<2>"), (logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"),
)  # fmt: skip
_DEBUG: Final = "<7>"


def prefix(level: int) -> str:
    """Return the prefix for a `logging` level if standard error is the journal, otherwise an empty string."""
    if not _is_stderr():
        return ""
    return next((mark for least, mark in _PRIORITIES if level >= least), _DEBUG)


@functools.cache
def _is_stderr() -> bool:
    """Whether standard error is the stream that JOURNAL_STREAM names, not a redirection (device and inode)."""
    try:
        status = os.fstat(_STDERR)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
