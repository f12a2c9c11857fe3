"""The heart: one batch of chunks, one transaction.

    step                                  a crash here leaves              repaired by
    ------------------------------------  -------------------------------  ------------------------------
    does the ledger know the digest?      a transaction, rolled back       the next load of the file
    decode; COPY; staging; isolate        the same                         the same
    marks of touched hours; ledger rows   the same                         the same
    were rows pruned in the meantime?     the same                         the same
    reject files, whole and synced        reject files, no ledger row      written again under their name
    COMMIT                                all of it, or none, or unknown   the ledger knows the digest

What follows (the file is retired) is up to the caller. Every line of a chunk ends as a new row, as a
duplicate of an equal row, as a reject or as expired; the ledger's own CHECK proves the sum in each transaction.
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
from loader.load import ledger, lowwater, marks
from loader.load.counts import Counts, Loaded
from loader.load.database import Connection, transaction
from loader.load.insert import insert, insert_lines
from loader.load.ledger import Entry
from loader.load.outcome import OVERSIZE, Outcome, decoded, decoded_lines


def load(connection: Connection, batch: Sequence[Chunk], spool: Path, duplicates: float = 0.0) -> Loaded:
    """Load the chunks in one transaction; their rejects go to the spool's `rejected/`.

    `duplicates` is the share of lines that are expected to exist; a wrong guess costs time only. Raises
    psycopg.Error and OSError, after which nothing was loaded, or, if the connection broke in the COMMIT, all
    of it: load again, the ledger knows. A chunk that is to be loaded `again` is, whatever the ledger knows.
    """
    with transaction(connection):
        low = lowwater.read(connection)
        known = ledger.known(connection, batch)
        fresh, repeated = _divide(batch, known)
        outcomes = insert(connection, fresh, duplicates, low) if fresh else []
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
    """Load the lines of a reject file that have become loadable; the file keeps the others.

    In pieces of a chunk's size, each a transaction: a file may have any size. If one fails, what was loaded
    before leaves the file all the same. Raises psycopg.Error, OSError and ValueError (not a reject file).
    """
    rejects.count([path])  # so that a damaged file is refused before any of it is loaded
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
    """Load a piece of a reject file and write to `kept` what is still rejected, before the COMMIT.

    The ledger gets a row for what was loaded: the others were counted when they were rejected. Lines that are
    retried have the same bytes each time, so the key of that row is random.
    """
    retried = [rejected for rejected in piece if rejected.code != OVERSIZE]
    left = [rejected for rejected in piece if rejected.code == OVERSIZE]
    name = f"{rejects.DIRECTORY}/{path.name}"
    chunk = Chunk(name, 0, sum(len(each.raw) + 1 for each in retried), 1, len(retried), b"")
    begin = kept.tell()
    try:
        with transaction(connection):
            outcome = Outcome(chunk, lowwater.read(connection))
            insert_lines(connection, list(decoded_lines(outcome, (rejected.raw for rejected in retried))))
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
    """Decode a chunk and count, without a database."""
    outcome = Outcome(chunk)
    for line in decoded([outcome]):
        line.insert()
    return outcome


def _record(
    connection: Connection, outcomes: Sequence[Outcome], known: set[bytes]
) -> tuple[list[Outcome], list[Outcome]]:
    """Write the chunks to the ledger; return those that it has now, and those that another loader had loaded.

    All rows of the latter existed, so nothing is counted twice. Raises psycopg.errors.SerializationFailure if
    some did not: another loader had rejected lines that could be loaded here.
    """
    entries = [_entry(outcome, known) for outcome in outcomes]
    recorded = ledger.record(connection, entries)
    ours: list[Outcome] = []
    overtaken: list[Outcome] = []
    for outcome, entry in zip(outcomes, entries, strict=True):
        (ours if entry.digest in recorded else overtaken).append(outcome)
    if any(outcome.counts.rows for outcome in overtaken):
        raise psycopg.errors.SerializationFailure("another loader was faster with these lines: try again")
    return ours, overtaken


def _divide(batch: Sequence[Chunk], known: set[bytes]) -> tuple[list[Chunk], list[Chunk]]:
    """Return the chunks to load, and those whose bytes the ledger or an earlier chunk of the batch has."""
    fresh: list[Chunk] = []
    repeated: list[Chunk] = []
    earlier: set[bytes] = set()
    for chunk in batch:
        is_known = chunk.digest in earlier or (chunk.digest in known and not chunk.again)
        (repeated if is_known else fresh).append(chunk)
        earlier.add(chunk.digest)
    return fresh, repeated


def _entry(outcome: Outcome, known: set[bytes]) -> Entry:
    """Return the chunk's row of the ledger; what is loaded again has a random key, as in `retry`."""
    entry = outcome.entry()
    return replace(entry, digest=secrets.token_bytes(32)) if entry.digest in known else entry


def _in_its_place(now: Rejected, before: Rejected) -> Rejected:
    """Return a reject with the file and line it was first read from."""
    return replace(now, file=before.file, line=before.line)
