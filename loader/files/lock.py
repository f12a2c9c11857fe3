"""One loader per directory: an flock on `.loader.lock`, which the kernel frees with the process (flock(2)).

So a lock file that a kill or a reboot left behind is no lock. Other hosts and backfills may load into the
same tables beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import tenacity

from loader.errors import LoaderError
from loader.files import nofollow
from spool.segment import MODE

LOCK: Final = ".loader.lock"

_LOCKING: Final = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(BlockingIOError),
    wait=tenacity.wait_fixed(0.05),
    stop=tenacity.stop_after_delay(0.5),
    reraise=True,
)
"""`holder` takes the lock for an instant, too."""


@contextlib.contextmanager
def exclusive(spool: Path) -> Iterator[None]:
    """Hold the spool's lock. Raises LoaderError, OSError."""
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(_lock_file(spool, os.O_RDWR | os.O_CREAT))
        except PermissionError:  # somebody else of the group has loaded here before
            left = held.enter_context(_lock_file(spool, os.O_RDONLY))
            _lock(left, spool)
            os.unlink(spool / LOCK)
            file = held.enter_context(_lock_file(spool, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        _lock(file, spool)
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield


def _lock(file: BinaryIO, spool: Path) -> None:
    try:
        _LOCKING(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LoaderError(f"{spool} has a loader already: {_written(file)}") from None


def holder(spool: Path) -> str | None:
    """Return who loads this spool, or None. Raises LoaderError, OSError."""
    try:
        with _lock_file(spool, os.O_RDONLY) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _written(file)
    except FileNotFoundError:
        pass
    return None


def _lock_file(spool: Path, flags: int) -> BinaryIO:
    """Open the lock, unless what is written to it would go elsewhere."""
    try:
        fd = os.open(spool / LOCK, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, MODE)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    else:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            if flags & os.O_CREAT:
                nofollow.hand_over(fd, spool.stat())
            return open(fd, "rb" if flags == os.O_RDONLY else "r+b")
        os.close(fd)
    raise LoaderError(f"{spool / LOCK} is a link, or no file: remove it")


def _written(file: BinaryIO) -> str:
    return file.read(200).decode(errors="replace").strip()
