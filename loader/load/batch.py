"""Loads one batch of chunks in one transaction.

    step                                  a crash here leaves              repaired by
    ------------------------------------  -------------------------------  ------------------------------
    read who was erased (erasures.py)     a transaction, rolled back       the next load of the file
    is the digest in the ledger?          the same                         the same
    decode; COPY; staging; isolate        the same                         the same
    marks of touched hours; ledger rows   the same                         the same
    were rows pruned in the meantime?     the same                         the same
    reject files, whole and synced        reject files, no ledger row      written again under their name
    COMMIT                                all of it, or none, or unknown   the digest in the ledger

The caller retires the files afterwards. Every line of a chunk becomes a new row, a duplicate of an equal row,
a reject, or is counted as erased or expired; a CHECK of the ledger verifies the sum in each transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import psycopg

from loader.errors import LoaderError
from loader.files import rejects
from loader.files.chunk import Chunk
from loader.files.rejects import Rejected
from loader.load import erasures, ledger, lowwater, marks
from loader.load.counts import Counts, Loaded
from loader.load.database import Connection, transaction
from loader.load.insert import insert, insert_lines
from loader.load.ledger import Entry
from loader.load.outcome import OVERSIZE, Outcome, decoded, decoded_lines, kept_lines


def load(connection: Connection, batch: Sequence[Chunk], spool: Path, duplicates: float = 0.0) -> Loaded:
    """Load the chunks in one transaction; their rejects are written to the spool's `rejected/`.

    `duplicates` is the estimated share of lines that are already loaded; a wrong estimate only costs time.
    Raises psycopg.Error and OSError. Then nothing was loaded or, if the connection broke during the COMMIT,
    possibly everything: load again, because the ledger detects loaded chunks. A chunk with `again` is loaded
    even if the ledger has it.
    """
    with transaction(connection):
        erased, low = erasures.current(connection), lowwater.read(connection)
        known = ledger.known(connection, batch)
        fresh, repeated = _divide(batch, known)
        outcomes = insert(connection, fresh, duplicates, erased, low) if fresh else []
        marks.record(connection, outcomes)
        outcomes, overtaken = _record(connection, outcomes, known)
        lowwater.check_unchanged(connection, low)
        for outcome in outcomes:
            rejects.write(spool, outcome.chunk, outcome.rejects)
    repeated += [outcome.chunk for outcome in overtaken]
    return sum(
        (outcome.loaded() for outcome in outcomes),
        Loaded(known=sum(c.line_count for c in repeated), bytes=sum(c.size for c in repeated)),
    )


def retry(connection: Connection, path: Path) -> Loaded:
    """Load those lines of a reject file that can be loaded now; the file keeps the others.

    Works in pieces of chunk size, each a transaction, because a file may have any size. If a piece fails, the
    lines of earlier pieces are still removed from the file. Raises psycopg.Error, OSError and ValueError (not
    a reject file).
    """
    rejects.count([path])  # refuse a damaged file before any of it is loaded
    total = Loaded()
    with rejects.replacing(path) as kept:
        pieces = rejects.pieces(path)
        failure: psycopg.Error | LoaderError | None = None
        for piece in pieces:
            try:
                total += _retry_piece(connection, path, piece, kept)
            except (psycopg.Error, LoaderError) as error:
                failure = error
                _keep(kept, piece)
                break
        for piece in pieces:
            _keep(kept, piece)
    if failure is not None:
        raise failure
    return total


def _retry_piece(connection: Connection, path: Path, piece: Sequence[Rejected], kept: BinaryIO) -> Loaded:
    """Load a piece of a reject file. Lines that are still rejected are written to `kept` before the COMMIT.

    The ledger gets a row for the loaded lines; the others were counted when they were rejected. The key of
    this row is random, because retried lines have the same bytes each time.
    """
    retried = [rejected for rejected in piece if rejected.code != OVERSIZE]
    left = [rejected for rejected in piece if rejected.code == OVERSIZE]
    name = f"{rejects.DIRECTORY}/{path.name}"
    chunk = Chunk(name, 0, sum(len(each.raw) + 1 for each in retried), 1, len(retried), b"")
    begin = kept.tell()
    try:
        with transaction(connection):
            outcome = Outcome(chunk, erasures.current(connection), lowwater.read(connection))
            lines = kept_lines(outcome.erasures, (rejected.raw for rejected in retried))
            insert_lines(connection, list(decoded_lines(outcome, lines)))
            marks.record(connection, [outcome])
            loaded = replace(outcome.counts, rejected=0)
            if loaded.lines:
                digest = secrets.token_bytes(32)
                ledger.record(connection, [Entry(digest, name, 0, chunk.size, loaded)])
            lowwater.check_unchanged(connection, outcome.marks)
            left += [_in_its_place(now, retried[now.line - 1]) for now in outcome.rejects]
            _keep(kept, left)
    except (psycopg.Error, LoaderError):
        kept.seek(begin)
        kept.truncate()
        raise
    return Loaded(loaded + Counts(rejected=len(left)), bytes=chunk.size)


def _keep(kept: BinaryIO, piece: Sequence[Rejected]) -> None:
    kept.writelines(rejected.encode() for rejected in piece)
    kept.flush()


def check(chunk: Chunk) -> Outcome:
    """Decode a chunk and count its lines, without a database."""
    outcome = Outcome(chunk, erasures.NOBODY)
    for line in decoded([outcome]):
        line.insert()
    return outcome


def _record(
    connection: Connection, outcomes: Sequence[Outcome], known: set[bytes]
) -> tuple[list[Outcome], list[Outcome]]:
    """Write the chunks to the ledger; return the recorded ones, and those that another loader had loaded before.

    All rows of the latter existed, so nothing is counted twice. Raises psycopg.errors.SerializationFailure if
    some did not, because another loader had rejected lines that could be loaded here.
    """
    entries = [_entry(outcome, known) for outcome in outcomes]
    recorded = ledger.record(connection, entries)
    ours: list[Outcome] = []
    overtaken: list[Outcome] = []
    for outcome, entry in zip(outcomes, entries, strict=True):
        (ours if entry.digest in recorded else overtaken).append(outcome)
    if any(outcome.counts.rows for outcome in overtaken):
        raise psycopg.errors.SerializationFailure(
            "another loader loaded these lines at the same time: try again"
        )
    return ours, overtaken


def _divide(batch: Sequence[Chunk], known: set[bytes]) -> tuple[list[Chunk], list[Chunk]]:
    """Return the chunks to load, and those whose bytes are in the ledger or in an earlier chunk of the batch."""
    fresh: list[Chunk] = []
    repeated: list[Chunk] = []
    earlier: set[bytes] = set()
    for chunk in batch:
        is_known = chunk.digest in earlier or (chunk.digest in known and not chunk.again)
        (repeated if is_known else fresh).append(chunk)
        earlier.add(chunk.digest)
    return fresh, repeated


def _entry(outcome: Outcome, known: set[bytes]) -> Entry:
    """Return the chunk's ledger row; a chunk loaded `again` gets a random key, as in `retry`."""
    entry = outcome.entry()
    return replace(entry, digest=secrets.token_bytes(32)) if entry.digest in known else entry


def _in_its_place(now: Rejected, before: Rejected) -> Rejected:
    """Return a reject with the file and line number from which it was first read."""
    return replace(now, file=before.file, line=before.line)
