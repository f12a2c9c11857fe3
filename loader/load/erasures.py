"""The tombstones of erased people in the database, `analytics_erasures`.

Each load begins by taking their lock in shared mode and reading the number of the last tombstone. An erasure holds
the lock exclusively until its transaction ends (schema.sql), so each load either ends before the rows are deleted, or
sees the tombstone. Tables of an earlier version have no tombstones.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from weakref import WeakKeyDictionary

from loader.files import rejects
from loader.files.claim import claimed
from loader.files.erase import PART, Swept, sweep_named
from loader.files.mentions import Mentions
from loader.files.rejects import Rejected
from loader.load import ledger
from loader.load.counts import Counts
from loader.load.database import Connection, transaction
from loader.load.ledger import Entry

VERSION: Final = 5
"""The first version of the tables that has erasures."""
_KEPT: Final = (rejects.WHOLE, PART)
"""Other files in the directory of rejects: kept whole, or left by a crash."""
_PATIENCE: Final = 20.0
"""Seconds to wait for a process that is retrying a reject file."""
_SHARE: Final = (
    b"SELECT pg_catalog.pg_advisory_xact_lock_shared(pg_catalog.hashtext('analytics_erasures')::bigint)"
)
_EXIST: Final = "SELECT pg_catalog.to_regclass('analytics_erasures') IS NOT NULL"
_LAST: Final = "SELECT coalesce(pg_catalog.max(number), 0) FROM analytics_erasures"
_KEYS: Final = "SELECT key FROM analytics_erasure_keys"
_SUBJECTS: Final = "SELECT subject, kind FROM analytics_erasures"


class Erasures(Mentions):
    """The people erased up to the tombstone with the number `last`; `kinds` is keyed by subject."""

    def __init__(self, last: int, keys: frozenset[bytes], kinds: Mapping[bytes, str]) -> None:
        super().__init__(keys=keys, subjects=kinds)
        self.last = last
        self.keys = keys
        self.kinds = kinds


NOBODY: Final = Erasures(0, frozenset(), {})
_known: WeakKeyDictionary[Connection, Erasures] = WeakKeyDictionary()


def current(connection: Connection) -> Erasures | None:
    """Return the erased people, and block further erasures until the transaction ends. None for older tables.

    Call it before any other statement that uses the tables. Raises psycopg.Error.
    """
    connection.execute(_SHARE)  # a separate statement: the next one takes its snapshot after the wait
    return seen(connection)


def seen(connection: Connection) -> Erasures | None:
    """Do as `current`, without blocking erasures. Raises psycopg.Error."""
    if connection.execute(_EXIST).fetchone() != (True,):
        return None
    ((last,),) = connection.execute(_LAST).fetchall()
    known = _known.get(connection, NOBODY)
    if known.last != last:
        keys = frozenset(key for (key,) in connection.execute(_KEYS))
        known = _known[connection] = Erasures(last, keys, dict(connection.execute(_SUBJECTS).fetchall()))
    return known


# ---- rejects ----------------------------------------------------------------------------------------


def sweep_rejects(connection: Connection, spool: Path, mentions: Mentions) -> Swept:
    """Remove people from the reject files of a spool. Raises psycopg.Error, OSError."""
    swept = sweep_named(spool / rejects.DIRECTORY, _KEPT, mentions)
    for path in rejects.files(spool):
        try:
            if not _claim_and_sweep(connection, path, mentions, swept):
                swept.failures[path.name] = "is being retried: run `loader erase --again`"
        except (OSError, ValueError) as error:
            swept.failures[path.name] = f"could not be searched: {error}"
    return swept


def _claim_and_sweep(connection: Connection, path: Path, mentions: Mentions, swept: Swept) -> bool:
    """Sweep a file. Return False if another process kept it locked to retry its lines."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        with claimed(path) as is_ours:
            if is_ours:
                _sweep_file(connection, path, mentions, swept)
        if is_ours or not path.exists():
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)  # the release of another process's lock is not reported


def search_rejects(spool: Path, mentions: Mentions) -> Swept:
    """Search the reject files of a spool without changing them. Raises OSError."""
    swept = sweep_named(spool / rejects.DIRECTORY, _KEPT, mentions, dry_run=True)
    for path in rejects.files(spool):
        try:
            _, erased, mentioned = _divided(path, mentions, swept)
        except (OSError, ValueError) as error:
            swept.failures[path.name] = f"could not be searched: {error}"
        else:
            swept.lines, swept.mentions = swept.lines + len(erased), swept.mentions + mentioned
            swept.hits += bool(erased or mentioned)
            swept.files += bool(erased or mentioned)
    return swept


def _sweep_file(connection: Connection, path: Path, mentions: Mentions, swept: Swept) -> None:
    """Rewrite a reject file without the erased people, and record the removed lines in the ledger.

    They were counted as rejected before, like lines of a retry. The key of their ledger row is a digest of their
    bytes: if a crash after the COMMIT kept the file from being replaced, the next attempt recognizes them.
    """
    kept, erased, mentioned = _divided(path, mentions, swept)
    if not erased and not mentioned:
        return
    status = path.stat()
    name = mentions.redacted(f"{rejects.DIRECTORY}/{path.name}".encode()).decode()
    with rejects.replacing(path) as file:
        file.writelines(rejected.encode() for rejected in kept)
        if erased:
            lines = b"".join(rejected.encode() for rejected in erased)
            digest = hashlib.sha256(b"erased from " + name.encode() + lines).digest()
            with transaction(connection):
                ledger.record(connection, [Entry(digest, name, 0, len(lines), Counts(erased=len(erased)))])
    if kept:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # retry and prune go by its age
        if mentions.in_text(path.name):
            path.rename(path.with_name(Path(name).name))
    swept.lines, swept.mentions = swept.lines + len(erased), swept.mentions + mentioned
    swept.files += 1
    swept.hits += 1


def _divided(path: Path, mentions: Mentions, swept: Swept) -> tuple[list[Rejected], list[Rejected], int]:
    """Return the rejects to keep, the erased ones, and the number of kept ones in which an id was replaced."""
    kept: list[Rejected] = []
    erased: list[Rejected] = []
    mentioned = 0
    for rejected in rejects.read(path):
        swept.bytes += len(rejected.raw)
        raw = mentions.applied(rejected.raw)
        if raw is None:
            erased.append(rejected)
            continue
        texts = (rejected.file, rejected.code, rejected.reason)
        file, code, reason = (mentions.redacted(text.encode()).decode() for text in texts)
        now = Rejected(file, rejected.line, code, reason, raw)
        mentioned += now != rejected
        kept.append(now)
    if mentions.in_text(path.name) and kept:
        mentioned += 1
    return kept, erased, mentioned
