"""Whether a file is still being written: by a copy that pauses, say.

A read lease (fcntl(2), F_SETLEASE) is granted only if no process has the file open for writing, also through
a map. It takes the file's owner or CAP_LEASE, and a file system that has leases; otherwise only time shows:
a file that has not changed for GRACE_SECONDS is taken to be complete. The descriptor of a segment that a
child of the application inherited is not a writer: the flock that it still holds shows that.
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
"""Seconds without a change after which a file is complete if nothing else shows that."""
WRITER_SECONDS: Final = 600.0
"""The same for a file that some process has open for writing: a copy over a network that stalls."""


class Writing(Enum):
    """Whether some process has a file open for writing."""

    NOBODY = "nobody"
    SOMEBODY = "somebody"
    UNKNOWN = "unknown"


@contextlib.contextmanager
def leased(fd: int) -> Iterator[Writing]:
    """Yield who writes a file; nobody can begin to in the block if nobody does."""
    if sys.platform != "linux":  # which alone has leases
        yield Writing.UNKNOWN
        return
    try:
        # A lease that is broken sends SIGIO, which ends a process that does not expect it; SIGURG does not.
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
    """Whether no more will be written to a file, as far as that can be known.

    `unchanged_seconds` is how long the caller has seen it unchanged, for clocks that differ; a file that does
    not end in a whole line has to wait even if nobody has it open, as between two appends of a script.
    """
    with leased(fd) as writing:
        if writing is Writing.NOBODY and ends_in_line:
            return True
        needed = WRITER_SECONDS if writing is Writing.SOMEBODY else GRACE_SECONDS
        return max(unchanged_seconds, age(os.fstat(fd))) >= needed


def age(status: os.stat_result) -> float:
    """Return the seconds since a file or its name changed."""
    return time.time() - max(status.st_mtime, status.st_ctime)


def is_locked(fd: int) -> bool:
    """Whether somebody holds an exclusive flock on a file. Raises no error."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
