"""The ledger, `analytics_loads`: one row for each chunk, keyed by the digest of the chunk's bytes."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg import sql

from loader.errors import LoaderError
from loader.load.counts import Counts
from loader.load.database import Connection
from loader.load.triggers import triggers

TABLE: Final = "analytics_loads"


@dataclass(frozen=True)
class Entry:
    """A row of the ledger: the origin of a chunk and the counts of its lines."""

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
            counts.duplicates, counts.rejected, counts.erased,
        )  # fmt: skip


_COLUMNS: Final = {
    "digest": "bytea", "file": "text", "byte_offset": "bigint", "bytes": "bigint", "lines": "bigint",
    "events": "bigint", "metrics": "bigint", "duplicates": "bigint", "rejected": "bigint", "erased": "bigint",
}  # fmt: skip
"""The columns written by the loader, with their types."""
_SINCE_5: Final = ("erased",)
"""Columns that tables of version 4 lack, at the end of `_COLUMNS`; nothing is erased there."""


def known(connection: Connection, digests: Sequence[bytes]) -> set[bytes]:
    """Return the digests that are already in the ledger. Raises psycopg.Error."""
    found = connection.execute("SELECT digest FROM analytics_loads WHERE digest = ANY(%s)", [list(digests)])
    return {digest for (digest,) in found}


def record(connection: Connection, entries: Sequence[Entry]) -> set[bytes]:
    """Write ledger rows; return the digests of the new ones. The others were written by another loader.

    Rows are written in the order of the digests, so that two loaders cannot deadlock. Raises psycopg.Error,
    and LoaderError if the ledger does not store its rows.
    """
    if not entries:
        return set()
    ordered = sorted(entries, key=lambda entry: entry.digest)
    columns = _COLUMNS
    if not any(entry.counts.erased for entry in entries):
        columns = {name: kind for name, kind in _COLUMNS.items() if name not in _SINCE_5}
    arrays = [list(column) for column in zip(*(entry.values() for entry in ordered), strict=True)]
    values = [socket.gethostname(), *arrays[: len(columns)]]
    written = {digest for (digest,) in connection.execute(_recording(columns), values)}
    digests = {entry.digest for entry in entries}
    if written != digests or triggers(connection, TABLE):
        _check_kept(connection, digests)
    return written


def _recording(columns: Mapping[str, str]) -> sql.Composed:
    return sql.SQL(
        "INSERT INTO analytics_loads ({}, loader_host) SELECT entry.*, %s FROM unnest({}) AS entry "
        "ON CONFLICT (digest) DO NOTHING RETURNING digest"
    ).format(
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(sql.SQL(f"%s::{kind}[]") for kind in columns.values()),
    )


def _check_kept(connection: Connection, digests: set[bytes]) -> None:
    if digests - known(connection, list(digests)):
        causes = ", ".join(triggers(connection, TABLE))
        raise LoaderError(f"{TABLE} does not store its rows: remove its {causes}")
