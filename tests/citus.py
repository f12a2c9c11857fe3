"""A stand-in for Citus on a single server: a catalog that lists the tables as distributed, and a wire.

    install(connection)                # before `loader init --layout citus`
    with Wire.to(dsn) as wire:
        database.connect(wire.dsn)     # errors arrive as through Citus
        wire.statements                # what the client sent

Citus reports each error of a worker in a COPY as XX000, without the names of the constraint and column, and without the
function of the source that raised it. It refuses some SQL about distributed tables: see REFUSED.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from loader.load.database import Connection
from tests.proxy import Relay

_CATALOG: Final = """
    SET allow_system_table_mods = on;
    CREATE TABLE pg_catalog.pg_dist_partition (logicalrelid regclass, key text, colocated text);
    GRANT SELECT ON pg_catalog.pg_dist_partition TO PUBLIC;
    CREATE FUNCTION pg_catalog.create_distributed_table(named regclass, key text, colocate_with text DEFAULT 'default')
    RETURNS void BEGIN ATOMIC INSERT INTO pg_catalog.pg_dist_partition VALUES (named, key, colocate_with); END;
    CREATE FUNCTION pg_catalog.run_command_on_workers(command text)
    RETURNS TABLE (nodename text, nodeport int, success boolean, result text)
    BEGIN ATOMIC
        SELECT 'w1', 5432, true, current_setting('citus.stub_prepared', true) WHERE command ~ 'gid'
        UNION ALL SELECT *
        FROM (VALUES ('w1', 5432, false, 'refused'), ('w2', 5432, true, '3'), ('w3', 5432, true, '0')) AS counted
        WHERE command !~ 'gid';
    END;
    CREATE FUNCTION pg_catalog.citus_relation_size(named regclass) RETURNS bigint
    RETURN CASE WHEN named::text ~ '_other$' THEN 700 ELSE 100 END;
    RESET allow_system_table_mods;
"""
REFUSED: Final = re.compile(
    rb"LATERAL|OFFSET|WITH RECURSIVE|\(SELECT FROM (?:\"\w+\"\.)?\"analytics_(?:events|metrics)\"|row_to_json\((\w+)\) "
    rb"FROM \(.*\) AS \1|FOR UPDATE",
    re.IGNORECASE,
)
"""In a statement about a distributed table: "cannot push down this subquery" and "recursive CTEs are only supported
when they contain a filter on the distribution column", a subquery without columns, and FOR UPDATE of several shards; the keys of a subquery's row
would be f1, f2 and so on (Citus 15.0devel)."""
_ABOUT_DISTRIBUTED: Final = re.compile(rb'"analytics_(?:events|metrics)"')
_COPY: Final = re.compile(rb'COPY "analytics_(?:events|metrics)"')
_KEPT_FIELDS: Final = b"SVCMDHW"
"""Of an error: severity, code, message, detail, hint, context
(https://www.postgresql.org/docs/current/protocol-error-fields.html)."""
_HEADER: Final = 5
"""Bytes of a message's type and length."""


def install(connection: Connection) -> None:
    """Make the database look like a coordinator of Citus. Requires a superuser."""
    connection.execute(_CATALOG.encode())
    connection.commit()


class Wire(Relay):
    """Forwards connections to a server, records statements, and changes errors as Citus does."""

    def __init__(self, server: str, directory: Path) -> None:
        self.statements: list[bytes] = []
        self.internal_errors = 0
        """Errors in a COPY that were passed on as XX000."""
        super().__init__(server, directory)

    def refused(self) -> list[bytes]:
        """Return the statements about distributed tables that Citus would refuse."""
        return [text for text in self.statements if _ABOUT_DISTRIBUTED.search(text) and REFUSED.search(text)]

    def _connected(self, client: socket.socket, server: socket.socket) -> None:
        session = _Session(self)
        for source, target, passed, starts in (
            (client, server, session.from_client, True), (server, client, session.from_server, False)
        ):  # fmt: skip
            forward = (source, target, passed, starts)
            threading.Thread(target=_forward, args=forward, daemon=True).start()


class _Session:
    """One connection, with the last request of its client."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._last = b""

    def from_client(self, message: bytes) -> bytes:
        if message[:1] in b"QP":
            self._last = message[_HEADER:]
            self._wire.statements.append(self._last)
        return message

    def from_server(self, message: bytes) -> bytes:
        if message[:1] != b"E":
            return message
        fields = [field for field in message[_HEADER:].split(b"\0") if field and field[0] in _KEPT_FIELDS]
        if _COPY.match(self._last):
            self._wire.internal_errors += 1
            fields = [b"CXX000" if field.startswith(b"C") else field for field in fields]
        body = b"".join(field + b"\0" for field in fields) + b"\0"
        return b"E" + struct.pack("!I", len(body) + 4) + body


def _forward(
    source: socket.socket, target: socket.socket, passed: Callable[[bytes], bytes], starts: bool
) -> None:
    """Forward message by message; the first message of a client has no type."""
    with contextlib.suppress(OSError):
        if starts:
            length = _exactly(source, 4)
            target.sendall(length + _exactly(source, struct.unpack("!I", length)[0] - 4))
        while header := _exactly(source, _HEADER):
            target.sendall(passed(header + _exactly(source, struct.unpack("!I", header[1:])[0] - 4)))
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _exactly(source: socket.socket, count: int) -> bytes:
    """Return the given number of bytes, or none at the end of the stream."""
    data = b""
    while len(data) < count:
        if not (part := source.recv(count - len(data))):
            return b""
        data += part
    return data
