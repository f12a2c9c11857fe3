"""Connections, and the settings that a load's transaction depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg

Connection = psycopg.Connection[tuple[Any, ...]]


class _ReportingConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that reports whenever the server answers or accepts rows.

    Each wait of psycopg's ends here; a COPY waits for every MiB at least (psycopg 3.3).
    """

    progressed: Callable[[], None] = staticmethod(lambda: None)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().wait(*args, **kwargs)
        self.progressed()
        return answer


def connect(dsn: str, progressed: Callable[[], None] = lambda: None) -> Connection:
    """Connect; `progressed` is called whenever the server makes progress. Raises psycopg.OperationalError."""
    # A pooler in between may not keep prepared statements.
    connection = _ReportingConnection.connect(dsn, prepare_threshold=None)
    connection.progressed = progressed
    return connection


def prepare(connection: Connection) -> None:
    """Set what the transaction of a load depends on.

    Deferrable constraints are checked by each statement: at COMMIT, one row would fail all others. Plans are
    not compiled: that takes longer than looking up the rows of a batch. A lock that somebody holds for long
    is given up and requested again, so that the log shows what the loader waits for.
    """
    connection.execute("SET CONSTRAINTS ALL IMMEDIATE; SET LOCAL jit = off; SET LOCAL lock_timeout = '60s'")
