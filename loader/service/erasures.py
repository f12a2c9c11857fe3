"""Removes erased people from the files of a spool and its archive, as soon as the loader sees the erasure.

Before each pass the daemon reads the tombstones. Files that are kept after that no longer contain those people
(loader.files.retire); a thread searches the older files beside the load. The applied erasures are recorded in each
directory, so that an interrupted search is repeated, and a restart after a finished one searches nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import psycopg

from loader.errors import LoaderError, one_line
from loader.files import erase
from loader.files.erase import State, Swept
from loader.files.mentions import Latest, Mentions
from loader.load import erasures
from loader.load.database import Connection, connect
from loader.load.erasures import Erasures
from loader.load.sqlstate import explain

log = logging.getLogger("loader")

_RETRY_SECONDS: Final = 600.0
"""Seconds until files that could not be searched are tried again."""
_STOP_SECONDS: Final = 2.0


class Sweeper:
    """The erased people, and which of the erasures were applied to the files. `look` must be called by one thread."""

    def __init__(self, dsn: Callable[[], str], spool: Path, archive: Path | None) -> None:
        self.latest = Latest()
        self._dsn = dsn
        self._spool = spool
        self._archive = archive
        self._applied: dict[Path, State] = {}
        self._retry_at = 0.0
        self._attempted = 0
        """The number of the last tombstone at the last attempt."""
        self._thread: threading.Thread | None = None
        self._reported: dict[str, str] = {}

    def look(self, seen: Erasures | None) -> bool:
        """Record who was erased; return whether files have to be searched now. Raises OSError."""
        if seen is None:
            return False
        self.latest.mentions = seen
        if not any(seen.kinds.keys() - self._state(root).kinds.keys() for root in self._roots()):
            return False
        return seen.last != self._attempted or time.monotonic() >= self._retry_at

    def tick(self, seen: Erasures | None) -> None:
        """Record who was erased, and start a search beside the load if one is due."""
        try:
            if (self._thread is None or not self._thread.is_alive()) and self.look(seen):
                assert seen is not None  # a search is only due after an erasure
                self._thread = threading.Thread(target=self.sweep, args=[seen], name="erasures", daemon=True)
                self._thread.start()
        except OSError as error:
            self._report({str(self._spool): f"could not be searched for erased people: {error}"})

    def close(self) -> None:
        """Wait briefly for a search to end; an interrupted one is repeated by the next daemon."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def sweep(self, seen: Erasures) -> None:
        """Search the files and record the applied erasures; failures are logged and tried again."""
        self._attempted, self._retry_at = seen.last, time.monotonic() + _RETRY_SECONDS
        try:
            with closing(connect(self._dsn())) as connection:
                swept = sweep(connection, self._spool, self._archive, seen)
            self._report(swept.failures)
            if not swept.failures:
                for root in self._roots():
                    self._note(root, seen)
            if swept.files:
                log.info(
                    "erased %d lines and %d mentions in %d files", swept.lines, swept.mentions, swept.files
                )
        except (psycopg.Error, OSError, LoaderError) as error:
            reason = explain(error) if isinstance(error, psycopg.Error) else error
            self._attempted = 0
            self._report({str(self._spool): f"could not be searched for erased people: {reason}"})

    def _roots(self) -> list[Path]:
        return [self._spool, *([self._archive] if self._archive else [])]

    def _state(self, root: Path) -> State:
        if root not in self._applied:
            self._applied[root] = erase.state(root)
        return self._applied[root]

    def _note(self, root: Path, seen: Erasures) -> None:
        self._applied[root] = note_applied(root, seen)

    def _report(self, failures: dict[str, str]) -> None:
        for name, why in failures.items():
            if self._reported.get(name) != why:
                log.warning("%s %s", one_line(name), why)
        self._reported = failures


def note_applied(root: Path, seen: Erasures) -> State:
    """Add `seen` to the erasures recorded for a directory, and return all recorded ones.

    Writes nothing if the directory is missing. Raises OSError.
    """
    before = erase.state(root)
    applied = State(before.keys | seen.keys, {**before.kinds, **seen.kinds})
    if root.is_dir() and applied != before:
        erase.write_state(root, applied)
    return applied


def sweep(connection: Connection, spool: Path, archive: Path | None, mentions: Mentions) -> Swept:
    """Remove people from the reject files of a spool and from its archive. Raises psycopg.Error, OSError."""
    swept = erasures.sweep_rejects(connection, spool, mentions)
    if archive is not None:
        swept += erase.sweep(archive, mentions)
    return swept
