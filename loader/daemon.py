"""The daemon: look, load what is sealed, wait for more.

Holds `.loader.lock` in the spool, so that there is one loader per directory; other hosts and backfills may
load into the same tables beside it. Hints come from inotify; because its queue can overflow without a word
(watchfiles issue 348), the whole directory is looked at every RESCAN_SECONDS as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import tenacity
import watchfiles

from loader import directory, rejects
from loader.errors import LoaderError
from loader.retire import Version, retire
from loader.watch import Scan, scan
from loader.workers import Report, Workers
from spool.segment import MODE, SEALED

log = logging.getLogger("loader")

LOCK: Final = ".loader.lock"
RESCAN_SECONDS: Final = 5.0
_DEBOUNCE_MS: Final = 50
"""Milliseconds that seals are gathered for; watchfiles' own 1,600 would be most of the lag."""

_LOCKING: Final = tenacity.Retrying(
    retry=tenacity.retry_if_exception_type(BlockingIOError),
    wait=tenacity.wait_fixed(0.05),
    stop=tenacity.stop_after_delay(0.5),
    reraise=True,
)
"""`holder` takes the lock for an instant, too."""


class SpoolFile:
    """A sealed segment of the spool, removed when it is loaded; its ledger name is its file name."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._version: Version | None = None

    def open(self) -> BinaryIO:
        stream = directory.open_file(self._path)
        self._version = Version.of(os.fstat(stream.fileno()))
        return stream

    def done(self, *, oversize: bool) -> None:
        keep = self._path.parent / rejects.DIRECTORY / (self._path.stem + rejects.WHOLE)
        assert self._version is not None  # a file that is done was open
        if not retire(self._path, self._version, keep if oversize else None):
            raise OSError("it has changed since")


def run(spool: Path, workers: Workers, stop: threading.Event) -> None:
    """Load what is sealed until `stop` is set. Raises LoaderError where another loader has the spool."""
    with exclusive(spool):
        log.info("watching %s", spool)
        told: set[str] = set()
        watched = True
        while not stop.is_set():
            try:
                _tell(once(spool, workers), told)
            except OSError as error:
                log.error("can't look at %s: %s", spool, error)
            watched = _wait(spool, stop, watched)


def once(spool: Path, workers: Workers) -> tuple[Scan, Report]:
    """Load what is sealed now, the segments of dead writers too. Raises LoaderError, OSError."""
    found = scan(spool)
    return found, workers.load(SpoolFile(path) for path in found.sealed)


@contextlib.contextmanager
def exclusive(spool: Path) -> Iterator[None]:
    """Hold the spool's lock, which the kernel frees with the process. Raises LoaderError, OSError."""
    with _lock_file(spool, os.O_RDWR | os.O_CREAT) as file:
        try:
            _LOCKING(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoaderError(f"{spool} has a loader already: {_written(file)}") from None
        file.truncate()
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        yield


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
            return open(fd, "rb" if flags == os.O_RDONLY else "r+b")
        os.close(fd)
    raise LoaderError(f"{spool / LOCK} is a link, or no file: remove it")


def _written(file: BinaryIO) -> str:
    return file.read(200).decode(errors="replace").strip()


def _tell(seen: tuple[Scan, Report], told: set[str]) -> None:
    """Log what a pass did, and once for each name what was not touched."""
    found, report = seen
    for name, why in found.skipped.items():
        if name not in told:
            log.warning("not touched: %r: %s", name, why)
    told.clear()
    told.update(found.skipped)
    for path in found.adopted:
        log.info("sealed %s, whose writer is gone", path.name)
    if found.torn_bytes:
        log.warning("%d bytes of lines that their writers did not finish were cut off", found.torn_bytes)
    if report.files:
        tally = report.tally
        log.info(
            "%d files: %d events, %d metrics, %d duplicates, %d rejected, %d known",
            report.files, tally.events, tally.metrics, tally.duplicates, tally.rejected, tally.known,
        )  # fmt: skip


def _wait(spool: Path, stop: threading.Event, watched: bool) -> bool:
    """Return when a segment was sealed, after RESCAN_SECONDS, or when `stop` is set.

    The value is whether the directory could be watched; `watched` is what it was the last time.
    """
    try:
        for _ in watchfiles.watch(
            spool, watch_filter=_is_sealed, debounce=_DEBOUNCE_MS, step=_DEBOUNCE_MS // 2, stop_event=stop,
            rust_timeout=int(RESCAN_SECONDS * 1000), yield_on_timeout=True, recursive=False,
        ):  # fmt: skip
            break
        return True
    except OSError as error:  # the directory went away, or there are no inotify watches left
        if watched:
            log.warning("can't watch %s: %s; looking every %g s", spool, error, RESCAN_SECONDS)
        stop.wait(RESCAN_SECONDS)
        return False


def _is_sealed(change: watchfiles.Change, path: str) -> bool:
    return change is not watchfiles.Change.deleted and path.endswith(SEALED)
