"""The connection of a worker, opened on demand and reopened after it broke."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import psycopg

from loader.files.chunk import Chunk
from loader.load import erasures
from loader.load.batch import load
from loader.load.counts import Loaded
from loader.load.database import Connection, NodeFailedError, transaction
from loader.load.erasures import Erasures
from loader.load.sqlstate import is_lost

_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 30.0
"""Seconds between two attempts to open an additional connection."""


class WorkerConnection:
    """A connection that is opened by `connect` and checked by `connected`. For one thread, except `cut`."""

    def __init__(self, connect: Callable[[], Connection], connected: Callable[[Connection], None]) -> None:
        self.failures = 0
        """Failed attempts to connect since the last success."""
        self._connect = connect
        self._connected = connected
        self._connection: Connection | None = None
        self._due = 0.0
        self._duplicates = 0.0
        """Share of duplicates in the last batch, used as an estimate for the next."""

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    @property
    def is_due(self) -> bool:
        """Whether the next attempt to connect is due."""
        return time.monotonic() >= self._due

    def connect(self) -> None:
        """Open the connection unless it is open. Raises psycopg.Error, LoaderError."""
        if self._connection is not None:
            return
        wait = min(_FIRST_WAIT * 2**self.failures, _LONGEST_WAIT)
        self.failures, self._due = self.failures + 1, time.monotonic() + wait
        self._connection = self._connect()
        with self._closing_on_error():
            self._connected(self._connection)
        self.failures, self._due = 0, 0.0

    def load(self, batch: Sequence[Chunk], spool: Path) -> Loaded:
        """Load a batch. Raises as `loader.load.batch.load` does.

        The server, a pooler or a firewall may have closed an idle connection. That is not an outage: the
        connection is reopened once. On Citus a duplicate may have failed a COPY, so the rows are compared then.
        """
        try:
            return self._load(batch, spool)
        except psycopg.OperationalError as error:
            if not is_lost(error):
                raise
            if isinstance(error, NodeFailedError):
                self._duplicates = 1.0
        self.connect()
        return self._load(batch, spool)

    def _load(self, batch: Sequence[Chunk], spool: Path) -> Loaded:
        assert self._connection is not None  # there was an open connection
        with self._closing_on_error():
            loaded = load(self._connection, batch, spool, self._duplicates)
        if lines := loaded.counts.lines:
            self._duplicates = loaded.counts.duplicates / lines
        return loaded

    def erasures(self) -> Erasures | None:
        """Return who was erased; None for tables of an earlier version. Raises psycopg.Error."""
        assert self._connection is not None  # it was connected
        with self._closing_on_error(), transaction(self._connection):
            return erasures.seen(self._connection)

    def close(self) -> None:
        """Close the connection. Safe to repeat."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close_if_lost(self) -> None:
        """Close an idle connection that the server ended, so that an outage is noticed while nothing is loaded.

        To an idle client a server sends only its last message, or reloaded settings.
        """
        if self._connection is not None and _is_readable(self._connection):
            self.close()

    def cut(self) -> None:
        """Interrupt the connection from another thread, by shutting down its socket."""
        connection = self._connection
        with contextlib.suppress(psycopg.Error, OSError):
            if connection is not None:
                with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
                    duplicate.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error:
            self.close()
            raise


def _is_readable(connection: Connection) -> bool:
    """Whether the server has sent data or closed the connection."""
    poll = select.poll()
    try:
        poll.register(connection.fileno(), select.POLLIN)
    except psycopg.Error:  # the driver has already noticed it
        return True
    return bool(poll.poll(0))
