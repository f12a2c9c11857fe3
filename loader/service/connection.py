"""A worker's connection: opened when it is needed, and again after it broke."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg

from loader.files.chunk import Chunk
from loader.load.batch import load
from loader.load.counts import Loaded
from loader.load.database import Connection


class WorkerConnection:
    """`connect` opens a connection; `connected` checks each new one. To be used by one thread, but `cut`."""

    def __init__(self, connect: Callable[[], Connection], connected: Callable[[Connection], None]) -> None:
        self._connect = connect
        self._connected = connected
        self._connection: Connection | None = None
        self._duplicates = 0.0
        """Share of duplicates in the last batch: a guess at that of the next."""

    def connect(self) -> None:
        """Open the connection unless it is open. Raises psycopg.Error, LoaderError."""
        if self._connection is None:
            self._connection = self._connect()
            with self._closing_on_error():
                self._connected(self._connection)

    def load(self, batch: Sequence[Chunk], spool: Path) -> Loaded:
        """Load a batch. Raises as `loader.load.batch.load`."""
        assert self._connection is not None  # it was connected
        with self._closing_on_error():
            loaded = load(self._connection, batch, spool, self._duplicates)
        if lines := loaded.counts.lines:
            self._duplicates = loaded.counts.duplicates / lines
        return loaded

    def close(self) -> None:
        """Close the connection. Safe to repeat."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def cut(self) -> None:
        """Interrupt whatever the connection does, from another thread: its socket is shut down."""
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
