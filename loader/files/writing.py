"""Detects whether a file is still being written, for example by a copy that pauses.

A read lease (fcntl(2), F_SETLEASE) is granted only if no process has the file open for writing, also through
a map. It requires the file's owner or CAP_LEASE, and a file system with leases; otherwise a file that has not
changed for GRACE_SECONDS is considered complete. A child of the application may have inherited the descriptor
of a segment without being a writer: the flock that it still holds shows that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from enum import Enum
from typing import Final

GRACE_SECONDS: Final = 10.0
"""Seconds without a change after which a file counts as complete if nothing else proves it."""
WRITER_SECONDS: Final = 600.0
"""The same if a process has the file open for writing, such as a stalled copy over a network."""


class Writing(Enum):
    """Whether some process has a file open for writing."""

    NOBODY = "nobody"
    SOMEBODY = "somebody"
    UNKNOWN = "unknown"


@contextlib.contextmanager
def leased(fd: int) -> Iterator[Writing]:
    """Yield whether a file is being written. If it is not, no process can start writing it within the block."""
    if sys.platform != "linux":  # the only platform with leases
        yield Writing.UNKNOWN
        return
    try:
        # A broken lease sends SIGIO, which kills a process without a handler; SIGURG does not.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        yield Writing.SOMEBODY if error.errno == errno.EAGAIN and not is_locked(fd) else Writing.UNKNOWN
        return
    try:
        yield Writing.NOBODY
    finally:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def is_complete(fd: int, unchanged_seconds: float = 0.0, *, ends_in_line: bool = True) -> bool:
    """Whether a file is complete, as far as that can be known.

    `unchanged_seconds` is how long the caller has seen it unchanged, in case clocks differ. A file that does
    not end in a whole line has to wait even if no process has it open, as between two appends of a script.
    """
    with leased(fd) as writing:
        if writing is Writing.NOBODY and ends_in_line:
            return True
        needed = WRITER_SECONDS if writing is Writing.SOMEBODY else GRACE_SECONDS
        return max(unchanged_seconds, age(os.fstat(fd))) >= needed


def age(status: os.stat_result) -> float:
    """Return the seconds since the last change of a file or its name."""
    return time.time() - max(status.st_mtime, status.st_ctime)


def is_locked(fd: int) -> bool:
    """Whether a process holds an exclusive flock on a file. Never raises."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
