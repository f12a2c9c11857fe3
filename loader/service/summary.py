"""Logs one line per minute at level info for all loaded files: a line for each pass would fill a journal."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from loader.files.scan import backlog
from loader.service.health import Health

log = logging.getLogger("loader")

SECONDS: Final = 60.0


class Summary:
    """Logs, at an interval, the counts since the last line, if anything was loaded."""

    def __init__(self, spool: Path, health: Health, seconds: float = SECONDS) -> None:
        self._spool = spool
        self._health = health
        self._seconds = seconds
        self._begun = time.monotonic()

    def tick(self) -> None:
        """Log a line if it is due."""
        if time.monotonic() - self._begun >= self._seconds:
            self.log()

    def log(self) -> None:
        """Log the counts that are not logged yet, if any."""
        seconds, self._begun = time.monotonic() - self._begun, time.monotonic()
        files, loaded = self._health.take_unlogged()
        if not files and not loaded.counts.lines and not loaded.known:
            return
        facts = {
            "files": files, "rows": loaded.counts.rows, **loaded.facts(), "bytes": loaded.bytes,
            "lag_seconds": self._lag(), "seconds": round(seconds, 1),
        }  # fmt: skip
        log.info(
            "%(files)d files in %(seconds).0f s: %(rows)d rows (%(events)d events, %(metrics)d metrics), "
            "%(duplicates)d duplicates, %(rejected)d rejected, %(erased)d erased, %(expired)d expired, "
            "%(known)d known; "
            "lag %(lag_seconds).1f s",
            facts, extra=facts,
        )  # fmt: skip

    def _lag(self) -> float:
        """Return the age of the oldest sealed file in seconds, or 0 if there is none or the spool cannot be read."""
        try:
            return round(backlog(self._spool).lag_seconds, 1)
        except OSError:
            return 0.0
