"""Allows one loader per directory, by an flock on `.loader.lock` that the kernel frees with the process (flock(2)).

So a lock file left behind by a kill or a reboot is not a lock. Other hosts and backfills may load into the
same tables at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, Final

from loader.errors import LoaderError
from loader.files import nofollow
from spool.segment import FILE_MODE

LOCK: Final = ".loader.lock"

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_FOREIGN: Final = "which holds the lock of"
_PATIENCE: Final = 0.5
"""Seconds to wait for the lock, because `holder` also takes it for an instant."""


@contextlib.contextmanager
def exclusive(spool: Path) -> Iterator[None]:
    """Hold the spool's lock. Raises LoaderError, OSError.

    On a full disk the lock file cannot be created or written. So every loader also locks the directory, which
    then suffices, because only a running loader frees space.
    """
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(_opened_or_replaced(spool))
        except OSError as error:
            if error.errno not in _FULL:
                raise
        else:
            _lock(file, spool)
            _write(file)
        directory = os.open(spool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, directory)
        _lock(directory, spool)
        yield


def _opened_or_replaced(spool: Path) -> BinaryIO:
    try:
        return _lock_file(spool, os.O_RDWR | os.O_CREAT)
    except PermissionError:  # another user of the group has loaded here before
        with _lock_file(spool, os.O_RDONLY) as left:
            _lock(left, spool)
            os.unlink(spool / LOCK)
            return _lock_file(spool, os.O_RDWR | os.O_CREAT | os.O_EXCL)


def _write(file: BinaryIO) -> None:
    """Write the holder's name into the lock file, for people; on a full disk the lock is valid without it."""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), f"{_me()}\n".encode(), 0)


def _me() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}, version {installed_version()}"


def installed_version() -> str:
    """Return the currently installed version of the package."""
    return metadata.version("analytics-spool")


def version_of(who: str) -> str:
    """Return the version in a result of `holder`, or an empty string if it has none."""
    return who.partition(", version ")[2]


def _lock(file: BinaryIO | int, spool: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LoaderError(f"{spool} already has a loader: {holder(spool) or 'unknown'}") from None
            time.sleep(0.05)
        else:
            return


def holder(spool: Path) -> str | None:
    """Return the holder of the spool's lock, or None. Raises LoaderError, OSError.

    The file contains the name written by the last loader. Any process that may open the file may lock it: if
    the kernel reports a different process of this host as the holder, the result names both.
    """
    try:
        with _lock_file(spool, os.O_RDONLY) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _described(_written(file), lock_holders(file.fileno()))
    except FileNotFoundError:
        pass
    return None


def is_foreign(who: str) -> bool:
    """Whether a process holds the lock that is not the loader named in the lock file."""
    return _FOREIGN in who


def lock_holders(fd: int) -> list[int]:
    """Return the processes that hold an flock on a file, as far as the kernel shows them (proc_locks(5))."""
    status = os.fstat(fd)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return [
            int(words[4]) for words in lines if len(words) > 5 and words[1] == "FLOCK" and words[5] == wanted
        ]
    return []


def _described(written: str, holders: list[int]) -> str:
    if not holders or any(written.startswith(f"pid {pid} ") for pid in holders):
        return written
    return f"process {holders[0]} ({_command(holders[0])}), {_FOREIGN} {written or 'nobody'}"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "unknown"


def _lock_file(spool: Path, flags: int) -> BinaryIO:
    """Open the lock file, unless it is a link, so that nothing is written elsewhere."""
    try:
        fd = os.open(spool / LOCK, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    else:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            if flags & os.O_CREAT:
                nofollow.hand_over(fd, spool.stat())
            return open(fd, "rb" if flags == os.O_RDONLY else "r+b", buffering=0)
        os.close(fd)
    raise LoaderError(f"{spool / LOCK} is a link or not a regular file: remove it")


def _written(file: BinaryIO) -> str:
    return os.pread(file.fileno(), 200, 0).decode(errors="replace").strip()
