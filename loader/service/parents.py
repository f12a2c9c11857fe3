"""Retries rejects without a parent row: events that were loaded before their user was committed.

A file with such rejects is retried with increasing waits for an hour after it was written. This runs beside
the load, in a thread with its own connection, which is open only during a retry. Loaded lines are removed
from the file and get a ledger row. After the hour, a person has to run `loader rejects retry`. Rejects are
written before the COMMIT of their chunk: if a line is loaded from here before that, and the chunk has to be
loaded again, the line is a duplicate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psycopg

from loader.errors import LoaderError
from loader.files.claim import claimed
from loader.files.waiting import RETRIED_SECONDS, waiting
from loader.load.batch import retry
from loader.load.counts import Loaded
from loader.load.database import Connection, connect
from loader.load.sqlstate import explain, is_temporary
from loader.service.health import Health
from loader.service.signals import Signals

log = logging.getLogger("loader")

_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 300.0
"""Seconds between two attempts, which makes about 20 in an hour."""
_TICK_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 2.0


@dataclass
class _Waiting:
    """A file with rejects that wait for a parent, with times in seconds since 1970 and waits in seconds."""

    until: float
    due: float
    wait: float = _FIRST_WAIT


class ParentRetries:
    """A thread that retries until `stop` is set. `dsn` is called for each connection."""

    def __init__(self, dsn: Callable[[], str], spool: Path, signals: Signals, health: Health) -> None:
        self._dsn = dsn
        self._spool = spool
        self._stop = signals.stop
        self._health = health
        self._files: dict[str, _Waiting] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._reported = ""
        self._thread = threading.Thread(target=self._run, name="parents", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Wait until the current file is done. A hanging retry is abandoned, and the server rolls it back."""
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            try:
                self._retry(self._due())
            except (psycopg.Error, OSError, LoaderError, ValueError) as error:
                reason = error if isinstance(error, ValueError) else explain(error)
                if not self._health.knows(reason):
                    self._report(str(reason))

    def _due(self) -> list[Path]:
        """Return the files that are due, and schedule their next attempt."""
        now, due = time.time(), []
        found = {path.name: (path, written) for path, written, _ in waiting(self._spool, self._seen)}
        self._files = {name: each for name, each in self._files.items() if name in found}
        for name, (path, written) in found.items():
            each = self._files.setdefault(name, _Waiting(written + RETRIED_SECONDS, written + _FIRST_WAIT))
            if each.due <= now < each.until:
                each.wait = min(2 * each.wait, _LONGEST_WAIT)
                each.due = now + each.wait
                due.append(path)
        return due

    def _retry(self, paths: list[Path]) -> None:
        if not paths:
            return
        with closing(connect(self._dsn())) as connection:
            problems = [
                problem
                for path in paths
                if not self._stop.is_set() and (problem := self._try_file(connection, path))
            ]
        self._report("; ".join(problems))

    def _try_file(self, connection: Connection, path: Path) -> str | None:
        """Retry a file; return the reason if it failed. Raises psycopg.Error if all files are affected."""
        try:
            with claimed(path) as is_ours:
                if is_ours:
                    self._retry_file(connection, path)
        except psycopg.Error as error:
            if is_temporary(error):
                raise
            return f"{path.name}: {explain(error)}"
        except (OSError, LoaderError, ValueError) as error:
            return f"{path.name}: {error}"
        return None

    def _retry_file(self, connection: Connection, path: Path) -> None:
        begun = time.monotonic()
        loaded = retry(connection, path)
        counts = replace(loaded.counts, rejected=0)  # because they were counted when they were rejected
        if counts.lines:
            self._health.loaded(Loaded(counts), time.monotonic() - begun)
            log.info("loaded %d rejected lines of %s, whose parent rows exist now", counts.lines, path.name)

    def _report(self, problem: str) -> None:
        """Log once why rejects are not retried; an outage that the load logs is not logged again."""
        if problem != self._reported:
            self._reported = problem
            if problem:
                log.warning("could not retry rejects: %s", problem)
