"""The ledger, `analytics_loads`: one row for each chunk, keyed by the digest of the chunk's bytes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from loader.load.counts import Counts
from loader.load.database import Connection


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: where a chunk was read, and what became of its lines."""

    digest: bytes
    file: str
    byte_offset: int
    bytes: int
    counts: Counts

    def values(self) -> tuple[Any, ...]:
        """Return the values of `_COLUMNS`."""
        counts = self.counts
        return (
            self.digest, self.file, self.byte_offset, self.bytes, counts.lines, counts.events, counts.metrics,
            counts.duplicates, counts.rejected,
        )  # fmt: skip


_COLUMNS: Final = {
    "digest": "bytea", "file": "text", "byte_offset": "bigint", "bytes": "bigint", "lines": "bigint",
    "events": "bigint", "metrics": "bigint", "duplicates": "bigint", "rejected": "bigint",
}  # fmt: skip
"""Columns that the loader writes, with their types."""
_RECORD: Final = sql.SQL(
    "INSERT INTO analytics_loads ({}, loader_host) SELECT entry.*, %s FROM unnest({}) AS entry "
    "ON CONFLICT (digest) DO NOTHING RETURNING 1"
).format(
    sql.SQL(", ").join(map(sql.Identifier, _COLUMNS)),
    sql.SQL(", ").join(sql.SQL(f"%s::{kind}[]") for kind in _COLUMNS.values()),
)


def known(connection: Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Return those digests whose chunks the ledger has already. Raises psycopg.Error."""
    found = connection.execute("SELECT digest FROM analytics_loads WHERE digest = ANY(%s)", [list(digests)])
    return {digest for (digest,) in found}


def record(connection: Connection, entries: Sequence[Entry]) -> None:
    """Write rows of the ledger.

    Raises psycopg.errors.SerializationFailure if another loader was faster with the same bytes: try again,
    then they are known.
    """
    if not entries:
        return
    arrays = [list(column) for column in zip(*(entry.values() for entry in entries), strict=True)]
    written = connection.execute(_RECORD, [socket.gethostname(), *arrays]).fetchall()
    if len(written) != len(entries):
        raise psycopg.errors.SerializationFailure("another loader was faster with these lines: try again")
