"""Records the accounts of writers in the database, in a thread of its own beside the load.

The account of a running writer is recorded at most once a minute, that of a dead writer as soon as it has
changed. The file of a dead writer is removed once none of its lines wait. Drops that it had not reported are
reported first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

import psycopg

from loader.errors import LoaderError
from loader.files import writers as files
from loader.files.writers import Stated
from loader.load import writers
from loader.load.database import connect, transaction
from loader.load.sqlstate import explain
from loader.service.health import Health
from loader.service.signals import Signals
from spool.account import Statement

log = logging.getLogger("loader")

_LIVING_SECONDS: Final = 60.0
_TICK_SECONDS: Final = 1.0
_LONGEST_WAIT: Final = 30.0
_STOP_SECONDS: Final = 2.0


def settle(dsn: Callable[[], str], spool: Path, found: Sequence[tuple[Statement, bool]]) -> list[Stated]:
    """Record accounts, report the drops of dead writers, and remove files that are no longer needed.

    Returns the recorded accounts. Raises psycopg.Error, OSError, LoaderError.
    """
    if not found:
        return []
    for statement, ended in found:
        if ended and (count := files.recover_drops(spool, statement)):
            log.info(
                "writer %s exited without reporting %d dropped lines: reported now", statement.writer, count
            )
    with closing(connect(dsn())) as connection, transaction(connection):
        stated = files.with_pending(spool, found)
        if stated is None or not writers.may_record(connection):
            return []
        writers.record(connection, stated)
    for each in stated:
        if each.is_settled:
            files.remove(spool, each.statement)
    return stated


def settle_quietly(dsn: Callable[[], str], spool: Path) -> None:
    """Settle all accounts; a failure is only logged, because the load does not depend on them."""
    try:
        files.prepare(spool)
        settle(dsn, spool, files.statements(spool))
    except (psycopg.Error, OSError, LoaderError) as error:
        log.warning("could not record what writers state: %s", error)


class Accounts:
    """A thread that settles the accounts until `stop` is set. `dsn` is called for each connection."""

    def __init__(self, dsn: Callable[[], str], spool: Path, signals: Signals, health: Health) -> None:
        self._dsn = dsn
        self._health = health
        self._spool = spool
        self._stop = signals.stop
        self._recorded: dict[str, tuple[float, tuple[Statement, bool]]] = {}
        self._reported = ""
        self._thread = threading.Thread(target=self._run, name="accounts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Wait until the current work is done. Hanging work is abandoned, and the server rolls it back."""
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        wait = _TICK_SECONDS
        while not self._stop.wait(wait):
            try:
                self._settle_due()
            except (psycopg.Error, OSError, LoaderError) as error:
                wait = min(2 * wait, _LONGEST_WAIT)
                reason = explain(error) if isinstance(error, psycopg.Error) else error
                if not self._health.knows(reason):
                    self._report(str(reason))
            else:
                wait = _TICK_SECONDS
                self._report("")

    def _settle_due(self) -> None:
        found = files.statements(self._spool)
        existing = {statement.writer for statement, _ in found}
        self._recorded = {writer: each for writer, each in self._recorded.items() if writer in existing}
        due = [each for each in found if self._is_due(*each)]
        settle(self._dsn, self._spool, due)
        now = time.monotonic()
        self._recorded |= {each[0].writer: (now, each) for each in due}

    def _is_due(self, statement: Statement, ended: bool) -> bool:  # noqa: FBT001  # an unpacked pair
        if (before := self._recorded.get(statement.writer)) is None:
            return True
        recorded_at, recorded = before
        age = time.monotonic() - recorded_at
        return ended != recorded[1] or age >= (5 * _TICK_SECONDS if ended else _LIVING_SECONDS)

    def _report(self, problem: str) -> None:
        """Log once why accounts are not recorded; an outage that the load logs is not logged again."""
        if problem != self._reported:
            self._reported = problem
            if problem:
                log.warning("could not record what writers state: %s", problem)
