"""Code shared by the commands that load: their workers and their exit codes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import psycopg

from loader import settings
from loader.cli import terminal
from loader.errors import SOME_REJECTED, LoaderError
from loader.load import database
from loader.service.health import Health
from loader.service.run import Report
from loader.service.signals import Signals
from loader.service.workers import Workers

PATIENCE: Final = 60.0
"""Seconds for which a one-off command waits for an unavailable database."""
INTERRUPTED: Final = "interrupted: the lines counted above are loaded; run the command again to continue"

ALL_KNOWN: Final = (
    "all lines are already loaded, so nothing was done; if rows were deleted since, `loader backfill "
    "--again` restores them"
)
EXPIRED: Final = "%d lines are older than what was pruned, so they were not loaded: `loader backfill --keep-expired` loads them"


def dsn_source(given: str | None) -> Callable[[], str]:
    """Return a function that returns the current DSN, which may change later. Raises UsageError without a DSN."""
    settings.database_dsn(given)
    return partial(settings.database_dsn, given)


def patient_workers(
    dsn: Callable[[], str], spool: Path, count: int, signals: Signals, health: Health | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Workers:  # fmt: skip
    """Return workers for a one-off command. Raises psycopg.Error immediately if the database is unreachable."""
    database.connect(dsn()).close()
    return Workers(dsn, spool, count, signals, PATIENCE, health, tick)


@contextlib.contextmanager
def only_for(actor: str) -> Iterator[None]:
    """Replace a permission error by a LoaderError that names who may run the command."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise LoaderError(f"{error.diag.message_primary}: run this as {actor}") from error


def finish(report: Report, signals: Signals | None, *, as_json: bool, **more: object) -> None:
    """Print the counts and exit with the matching exit code."""
    counts = {"files": report.files, **report.loaded.facts()}
    if as_json:
        terminal.print_json({**counts, **more, "failures": report.failures})
    else:
        terminal.say(terminal.counts(counts))
        for name, reason in report.failures.items():
            terminal.warn(f"{name} {reason}")
    if report.loaded.known and not report.loaded.counts.lines:
        terminal.warn(ALL_KNOWN)
    if (expired := report.loaded.counts.expired) and not as_json:  # which has the count
        terminal.warn(EXPIRED % expired)
    if signals is not None and signals.stop.is_set():
        raise LoaderError(INTERRUPTED)
    if report.failures:
        raise LoaderError(f"{len(report.failures)} files were not loaded completely")
    if report.loaded.counts.rejected:
        sys.exit(SOME_REJECTED)
