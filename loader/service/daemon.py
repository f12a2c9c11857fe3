"""The daemon: scan the spool, load sealed segments, wait for more.

inotify reports new segments. Because its queue can overflow silently (watchfiles issue 348), the whole
directory is also scanned every RESCAN_SECONDS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import watchfiles

from loader.errors import one_line
from loader.files import rejects, writers
from loader.files.lock import exclusive
from loader.files.retire import SpoolFiles
from loader.files.scan import Backlog, Scan, backlog
from loader.files.writing import GRACE_SECONDS
from loader.service.accounts import Accounts
from loader.service.erasures import Sweeper
from loader.service.health import Health
from loader.service.notify import Notifier
from loader.service.parents import ParentRetries
from loader.service.run import Report
from loader.service.signals import Signals
from loader.service.summary import Summary
from loader.service.upkeep import partitioner, refresher
from loader.service.workers import Workers
from spool.segment import OPEN, SEALED

log = logging.getLogger("loader")

RESCAN_SECONDS: Final = 5.0
UNWATCHABLE: Final = (OSError, RuntimeError)
"""Errors of watchfiles if the directory was removed, or if the kernel has no inotify watch left."""
_DEBOUNCE_MS: Final = 50
"""Milliseconds for which events are collected; the default of watchfiles, 1,600, would be most of the lag."""
_SETTLE_SECONDS: Final = 0.1
"""Seconds between two checks of files that may still be written."""
_IDLE_MS: Final = 500
"""Milliseconds after which a watch without changes returns, so that other work can be done."""


class Daemon:
    """Loads the sealed segments of a spool until a signal stops it, and reports its status."""

    def __init__(
        self, dsn: Callable[[], str], spool: Path, count: int, signals: Signals, archive: Path | None,
        notifier: Notifier,
    ) -> None:  # fmt: skip
        self.health = Health(notifier.alive)
        self._spool = spool
        self._signals = signals
        self._sweeper = Sweeper(dsn, spool, archive)
        self._files = SpoolFiles(spool, archive, erased=self._sweeper.latest)
        self._notifier = notifier
        self._workers = Workers(dsn, spool, count, signals, None, self.health, self._tick)
        self._parents = ParentRetries(dsn, spool, signals, self.health)
        self._accounts = Accounts(dsn, spool, signals, self.health)
        self._upkeep = (refresher(dsn), partitioner(dsn))
        self._summary = Summary(spool, self.health)
        self._rescan = min(RESCAN_SECONDS, notifier.watchdog_seconds / 4 or RESCAN_SECONDS)
        self._reloads = 0
        self._reported: dict[str, str] = {}
        self._reported_status: tuple[bool, str | None] | None = None
        self._status_due = 0.0

    def run(self) -> None:
        """Run until a signal stops it. Raises LoaderError if another loader holds the spool, and OSError."""
        parts = (self._workers, self._parents, self._accounts, *self._upkeep, self._sweeper)
        with exclusive(self._spool), contextlib.ExitStack() as ending:
            for part in reversed(parts):
                ending.callback(part.close)
            log.info("watching %s", self._spool)
            self._prepare()
            self._parents.start()
            self._accounts.start()
            self._tick_upkeep(busy=False)
            self._load_all()
            for _ in self._hints():
                self._load_all()
            self._notifier.stopping()
        self._summary.log()
        log.info("stopped")

    def _prepare(self) -> None:
        try:
            rejects.remove_leftovers(self._spool)
            writers.prepare(self._spool)
        except OSError as error:
            self._report_problems({str(self._spool): f"could not be prepared: {error}"})

    def _load_all(self) -> None:
        """Scan and load until a scan has found all files: one scan is bounded."""
        while not self._signals.stop.is_set() and self._scan_and_load():
            pass

    def _scan_and_load(self) -> bool:
        """Load the oldest files. Returns whether there are more."""
        self._reload()
        self.health.progressed()
        more = False
        try:
            found, files = self._files.scan()
            self._workers.connect()
            self._sweeper.tick(self._workers.erasures())
            report = self._workers.load(files)
        except OSError as error:
            self.health.unreadable = f"could not scan {self._spool}: {error}"
            self._report_problems({str(self._spool): f"could not be scanned: {error}"})
        else:
            self.health.unreadable = None
            self._report_pass(found, report)
            self._tick_upkeep(busy=report.files > 0)
            more = found.more
        self._report_status()
        return more

    def _tick(self) -> None:
        """Do periodic work while the workers load."""
        self._tick_upkeep(busy=True)
        self._report_status()

    def _tick_upkeep(self, *, busy: bool) -> None:
        for kind in self._upkeep:
            kind.tick(busy=busy)

    def _reload(self) -> None:
        """Reconnect with the current settings."""
        if self._reloads != self._signals.reloads:
            self._reloads = self._signals.reloads
            log.info("reloading: reconnecting")
            self._notifier.reloading()
            self._workers.close()

    def _report_pass(self, found: Scan, report: Report) -> None:
        """Log the results of a pass."""
        untouched = {name: f"is skipped: {why}" for name, why in found.skipped.items()}
        self._report_problems({**untouched, **found.failures, **report.failures})
        for path in found.adopted:
            log.info("sealed %s: its writer has exited", path.name)
        if found.torn_bytes:
            log.warning("cut off %d bytes of lines that their writers did not finish", found.torn_bytes)
        if report.files:
            self.health.files_done(report.files)
            facts = {"files": report.files, **report.loaded.facts()}
            log.debug(
                "%(files)d files: %(events)d events, %(metrics)d metrics, %(duplicates)d duplicates, "
                "%(rejected)d rejected, %(erased)d erased, %(expired)d expired, %(known)d known",
                facts, extra={**facts, "bytes": report.loaded.bytes},
            )  # fmt: skip

    def _report_problems(self, problems: dict[str, str]) -> None:
        """Log, once per name, why it cannot be loaded."""
        for name, why in problems.items():
            if self._reported.get(name) != why:
                log.warning("%s %s", one_line(name), why)
                self.health.failed(f"{name} {why}")
        self._reported = problems

    def _report_status(self) -> None:
        """Send the status to systemd: immediately if it changed, otherwise as often as measuring it is cheap."""
        self._summary.tick()
        status, begun = (self.health.connected, self.health.waits_for), time.monotonic()
        if status == self._reported_status and begun < self._status_due:
            return
        self._reported_status = status
        try:
            self._notifier.status(describe(backlog(self._spool), self.health))
        except OSError as error:
            self._notifier.status(f"could not scan {self._spool}: {error}")
        if any(status):
            self._notifier.ready()
        self._status_due = time.monotonic() + max(1.0, 20 * (time.monotonic() - begun))

    def _hints(self) -> Iterator[None]:
        """Yield when a segment was sealed (also during the last pass), after a timeout, or on a signal."""
        watched = True
        while not self._signals.stop.is_set():
            try:
                for _ in self._watch():
                    watched = True
                    yield
            except UNWATCHABLE as error:
                if watched:
                    log.warning("cannot watch %s: %s; scanning every %g s", self._spool, error, self._rescan)
                watched = False
                self._signals.stop.wait(self._rescan)
            yield

    def _watch(self) -> Iterator[None]:
        """Yield as `_hints` does, and once at the start of the watch for earlier seals, until a signal arrives.

        Also ends if the directory was replaced by another one. Raises OSError, RuntimeError (UNWATCHABLE).
        """
        with _pinned(self._spool) as watched:
            look_at = 0.0
            for changes in watchfiles.watch(
                self._spool, watch_filter=_is_hint, debounce=_DEBOUNCE_MS, step=_DEBOUNCE_MS // 2,
                stop_event=_Asked(self._signals), rust_timeout=_IDLE_MS, yield_on_timeout=True,
                recursive=False,
            ):  # fmt: skip
                for _, path in changes:
                    if path.endswith(OPEN):
                        self._files.note_open(Path(path))
                sealed = any(path.endswith(SEALED) for _, path in changes)
                if sealed or time.monotonic() >= look_at:
                    yield
                    look_at = time.monotonic() + self._rescan
                    if not os.path.samestat(os.stat(self._spool), watched):
                        return


def once(
    spool: Path, workers: Workers, archive: Path | None, adopt: Sequence[str] = ()
) -> tuple[Scan, Report]:
    """Load all sealed segments and those of dead writers. Raises LoaderError, OSError.

    Waits for a file that may still be written, at most GRACE_SECONDS without a change. If a process has it
    open for longer, it is loaded up to its last line and kept.
    """
    sweeper = Sweeper(workers.dsn, spool, archive)
    workers.connect()
    if (erased := workers.erasures()) and sweeper.look(erased):
        sweeper.sweep(erased)
    files, all_found, total = SpoolFiles(spool, archive, adopt, sweeper.latest), Scan(), Report()
    until = time.monotonic() + GRACE_SECONDS + 1
    while True:
        found, batch = files.scan()
        report = workers.load(batch)
        all_found.adopted += found.adopted
        all_found.torn_bytes += found.torn_bytes
        all_found.skipped = found.skipped
        total.loaded += report.loaded
        total.files += report.files
        total.failures |= report.failures | found.failures
        if workers.stopping:
            break
        if not found.more:
            if not (files.unsettled() or found.unsettled) or time.monotonic() > until:
                break
            time.sleep(_SETTLE_SECONDS)
    for name in files.unsettled():
        total.failures.setdefault(
            name, "is still being written: its lines so far are loaded, the rest will be loaded next time"
        )
    return all_found, total


def describe(waiting: Backlog, health: Health) -> str:
    """Return the status of a loader in one line."""
    parts = ["no backlog"]
    if waiting.sealed_files:
        size, age = waiting.sealed_bytes / 1e6, waiting.lag_seconds
        parts = [f"{waiting.sealed_files} files ({size:.1f} MB) wait, the oldest for {age:.0f} s"]
    parts.append(f"{health.rows_per_second():.0f} rows/s")
    if health.connections is not None:
        parts.append(f"only {health.connections} connections")
    if health.waits_for is not None:
        parts.insert(0, f"waiting: {health.waits_for}")
    elif health.last_error is not None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(health.last_error_at))
        parts.append(f"last error {moment}: {health.last_error}")
    return "; ".join(parts)


@contextlib.contextmanager
def _pinned(directory: Path) -> Iterator[os.stat_result]:
    """Yield the status of a directory, whose inode number is not reused within the block. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield os.fstat(descriptor)
    finally:
        os.close(descriptor)


class _Asked:
    """An event that is set once the daemon has to react to a signal."""

    def __init__(self, signals: Signals) -> None:
        self._signals, self._reloads = signals, signals.reloads

    def is_set(self) -> bool:
        return self._signals.stop.is_set() or self._signals.reloads != self._reloads


def _is_hint(change: watchfiles.Change, path: str) -> bool:
    """Whether a change is a sealed or a new open segment."""
    if path.endswith(OPEN):
        return change is watchfiles.Change.added
    return change is not watchfiles.Change.deleted and path.endswith(SEALED)
