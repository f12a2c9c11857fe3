"""A connection to Postgres that a test can cut at any byte: a Unix socket that forwards to the server's.

    with Proxy.to(dsn) as proxy:
        proxy.cut_at_commit(7)       # the next COMMIT is cut after 7 bytes of it and its response
        database.connect(proxy.dsn)

Bytes are counted from the first one of the client's message: 0 cuts before it, its length after it, and a
larger number within the server's response. A cut closes both sides, as a crash of either would.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo

COMMIT = b"COMMIT\0"
COPY_DONE = b"c\0\0\0\4"
_SOCKET = ".s.PGSQL.5432"


class _Cut:
    """The position of a cut: `left` bytes after the beginning of the message that contains `mark`."""

    def __init__(self, mark: bytes, left: int) -> None:
        self.mark = mark
        self.left = left
        self.begun = False


class Relay:
    """Accepts connections on a socket of its own, and opens one to a server for each."""

    def __init__(self, server: str, directory: Path) -> None:
        self.dsn = make_conninfo(server, host=str(directory))
        self._server = f"{conninfo_to_dict(server)['host']}/{_SOCKET}"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(directory / _SOCKET))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    @contextlib.contextmanager
    def to(cls, dsn: str) -> Iterator[Self]:
        """Listen in a temporary directory; its path is short enough for a socket."""
        with tempfile.TemporaryDirectory(prefix="relay-") as directory:
            relay = cls(dsn, Path(directory))
            try:
                yield relay
            finally:
                relay._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._connected(client, server)

    def _connected(self, client: socket.socket, server: socket.socket) -> None:
        """Start to forward a connection in both directions."""
        raise NotImplementedError


class Proxy(Relay):
    """Forwards each connection to a server, and cuts the one that reaches the requested position."""

    def __init__(self, server: str, directory: Path) -> None:
        self.cuts = 0
        """Connections that were cut."""
        self._cut: _Cut | None = None
        self._lock = threading.Lock()
        super().__init__(server, directory)

    def cut_at_commit(self, position: int) -> None:
        """Cut the next COMMIT after the given number of bytes of it and its response."""
        self.cut_at(COMMIT, position)

    def cut_at(self, mark: bytes, position: int) -> None:
        """Do as `cut_at_commit`, for the client's message that contains `mark`."""
        with self._lock:
            self._cut = _Cut(mark, position)

    def _connected(self, client: socket.socket, server: socket.socket) -> None:
        for source, target, from_client in ((client, server, True), (server, client, False)):
            forward = (source, target, from_client)
            threading.Thread(target=self._forward, args=forward, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        with contextlib.suppress(OSError):
            going = True
            while going and (data := source.recv(1 << 16)):
                allowed, going = self._allowed(data, from_client)
                target.sendall(data[:allowed])
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _allowed(self, data: bytes, from_client: bool) -> tuple[int, bool]:
        """Return how many of these bytes may pass, and whether the connection continues."""
        with self._lock:
            cut = self._cut
            if cut is None or not (cut.begun or (from_client and cut.mark in data)):
                return len(data), True
            begin = 0 if cut.begun else _message_of(data, cut.mark)
            cut.begun = True
            passing = min(len(data) - begin, cut.left)
            cut.left -= passing
            if cut.left:
                return begin + passing, True
            self._cut = None
            self.cuts += 1
            return begin + passing, False


def _message_of(data: bytes, mark: bytes) -> int:
    """Return the beginning of the message that contains the mark: a type byte and the length precede the text."""
    place = data.index(mark)
    return place if mark[:1] == b"c" else place - 5
