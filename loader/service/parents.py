"""Retries the rejects whose parent row did not exist yet: events that came before their user was committed.

A file with such rejects is retried with growing waits for an hour after it was written, beside the load: in a
thread with a connection of its own, which is open during a retry only. What is loaded leaves the file and
gets a ledger row. Afterwards `loader rejects retry` is left to a person. Rejects are written before the
COMMIT of their chunk; a line that is loaded from here before that is a duplicate if its chunk has to be
loaded again.
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
"""Seconds between two attempts: some 20 in an hour."""
_TICK_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 2.0


@dataclass
class _Waiting:
    """A file with rejects that wait for a parent: seconds since 1970, and seconds."""

    until: float
    due: float
    wait: float = _FIRST_WAIT


class ParentRetries:
    """A thread that retries until `stop` is set. `dsn` is called at each connect."""

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
        """Wait until the file in hand is done; what hangs is abandoned, and rolled back by the server."""
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
        """Return the files whose turn it is, and plan their next one."""
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
        """Retry a file; return why it could not be. Raises psycopg.Error for what concerns them all."""
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
        counts = replace(loaded.counts, rejected=0)  # which were counted before
        if counts.lines:
            self._health.loaded(Loaded(counts), time.monotonic() - begun)
            log.info("%d rejected lines of %s have their parent now and were loaded", counts.lines, path.name)

    def _report(self, problem: str) -> None:
        """Log why rejects are not retried, once; an outage that the load logs is not logged again."""
        if problem != self._reported:
            self._reported = problem
            if problem:
                log.warning("could not retry rejects: %s", problem)
