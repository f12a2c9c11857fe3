"""The heart: one batch of chunks, one transaction.

    step                                  a crash here leaves              mended by
    ------------------------------------  -------------------------------  ------------------------------
    does the ledger know the digest?      a transaction, rolled back       the next load of the file
    decode; COPY; staging; isolate        the same                         the same
    ledger rows                           the same                         the same
    reject files, whole and synced        reject files, no ledger row      written again under their name
    COMMIT                                all of it, or none, or unknown   the ledger knows the digest

What comes after (the file is retired) is the caller's. Every line of a chunk ends as a new row, as a
duplicate of an equal row or as a reject; the ledger's own CHECK proves the sum in each transaction.
"""

from __future__ import annotations

import re
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import psycopg

from loader import database, rejects
from loader.chunk import Chunk
from loader.database import EVENTS, METRICS, Connection, Entry, Table
from loader.decode import Reject, Row, decode
from loader.rejects import Rejected
from loader.sqlstate import Action, action

OVERSIZE: Final = "oversize"
"""Code of a line longer than a chunk: its reject holds its beginning only, so it can't be tried again."""
MANY_DUPLICATES: Final = 0.5
"""Share from which on comparing every row costs less than looking for those that are there (measured)."""
_BEGINNING: Final = re.compile(
    rb'\s*\{\s*"event_id"\s*:\s*"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"\s*,\s*"'
    rb"(event_type|metric_name)"
).match
_COPY_LINE: Final = re.compile(r", line (\d+)")


@dataclass(frozen=True)
class Tally:
    """What was done with some lines; `known` counts lines the ledger had already, which were left alone."""

    lines: int = 0
    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    rejected: int = 0
    known: int = 0
    bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass
class Outcome:
    """What becomes of the lines of one chunk."""

    chunk: Chunk
    lines: int = 0
    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    rejects: list[Rejected] = field(default_factory=list)

    def reject(self, line: int, raw: bytes, why: Reject) -> None:
        self.rejects.append(Rejected(self.chunk.file, line, why.code, why.reason, raw))

    def tally(self) -> Tally:
        rejected = len(self.rejects)
        return Tally(self.lines, self.events, self.metrics, self.duplicates, rejected, bytes=self.chunk.size)

    def entry(self) -> Entry:
        chunk = self.chunk
        return Entry(
            chunk.digest, chunk.file, chunk.offset, chunk.size, self.lines,
            self.events, self.metrics, self.duplicates, len(self.rejects),
        )  # fmt: skip


class _Line(msgspec.Struct, frozen=True, gc=False):
    outcome: Outcome
    number: int
    raw: bytes
    row: Row


def load(connection: Connection, batch: Sequence[Chunk], spool: Path, duplicates: float = 0.0) -> Tally:
    """Load the chunks in one transaction; their rejects go to the spool's `rejected/`.

    `duplicates` is the share of lines that are expected to be there already; a wrong guess costs time only.
    Raises psycopg.Error and OSError, after which nothing was loaded, or, where the connection broke in the
    COMMIT, all of it: do it again, the ledger knows.
    """
    with connection.transaction():
        known = database.known(connection, [chunk.digest for chunk in batch])
        fresh, repeated = _divide(batch, known)
        database.prepare(connection)
        outcomes = _place(connection, fresh, duplicates) if fresh else []
        database.record(connection, [outcome.entry() for outcome in outcomes])
        for outcome in outcomes:
            rejects.write(spool, outcome.chunk, outcome.rejects)
    return sum(
        (outcome.tally() for outcome in outcomes),
        Tally(known=sum(chunk.line_count for chunk in repeated), bytes=sum(c.size for c in repeated)),
    )


def retry(connection: Connection, path: Path) -> Tally:
    """Load the lines of a reject file that have become loadable; the file keeps the rest.

    The ledger gets a row for what was loaded alone: the others are counted where they were rejected first.
    Raises psycopg.Error, OSError and ValueError (not a reject file).
    """
    before = list(rejects.read(path))
    beginnings = [rejected for rejected in before if rejected.code == OVERSIZE]
    before = [rejected for rejected in before if rejected.code != OVERSIZE]
    data = b"\n".join(rejected.raw for rejected in before)
    name = f"{rejects.DIRECTORY}/{path.name}"
    # Lines that are tried again are the same bytes each time, so their ledger key is a random one.
    chunk = Chunk(name, 0, len(data), 1, len(before), data, given_digest=secrets.token_bytes(32))
    with connection.transaction():
        database.prepare(connection)
        outcome = Outcome(chunk)
        _place_apart(connection, [(outcome, [rejected.raw for rejected in before])], staged=False)
        left = [
            Rejected(before[now.line - 1].file, before[now.line - 1].line, now.code, now.reason, now.raw)
            for now in outcome.rejects
        ]
        tally = outcome.tally()
        outcome.lines -= len(outcome.rejects)
        outcome.rejects.clear()
        if outcome.lines:
            database.record(connection, [outcome.entry()])
    rejects.replace(path, beginnings + left)
    return tally + Tally(rejected=len(beginnings), lines=len(beginnings))


def check(chunk: Chunk) -> Outcome:
    """Decode a chunk and count, without a database."""
    outcome = Outcome(chunk)
    for line in _decode(outcome, chunk.lines()):
        if line.row.is_event:
            outcome.events += 1
        else:
            outcome.metrics += 1
    return outcome


def _divide(batch: Sequence[Chunk], known: set[bytes]) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks to load, and those whose bytes the ledger or an earlier chunk of the batch has."""
    fresh: list[Chunk] = []
    repeated: list[Chunk] = []
    seen = set(known)
    for chunk in batch:
        (repeated if chunk.digest in seen else fresh).append(chunk)
        seen.add(chunk.digest)
    return fresh, repeated


def _place(connection: Connection, chunks: Sequence[Chunk], duplicates: float) -> list[Outcome]:
    """Insert what has a row, reject the others: three ways, each slower than the one before, and surer."""
    staged = duplicates >= MANY_DUPLICATES
    ways = () if staged else (_place_sifted,) if duplicates else (_place_straight, _place_sifted)
    for way in ways:
        try:
            return way(connection, chunks)
        except psycopg.Error as error:
            if action(error.sqlstate) is not Action.REJECT:
                raise
            staged = isinstance(error, psycopg.errors.UniqueViolation)
        if not staged:
            break  # sifting helps against duplicates only
    outcomes = [Outcome(chunk) for chunk in chunks]
    _place_apart(connection, [(outcome, outcome.chunk.lines()) for outcome in outcomes], staged)
    return outcomes


def _place_straight(connection: Connection, chunks: Sequence[Chunk]) -> list[Outcome]:
    """Copy rows while they are decoded, so that the server works meanwhile.

    Raises psycopg.Error for a row that can't be, after which none is there.
    """
    outcomes = [Outcome(chunk) for chunk in chunks]
    _copy(connection, _lines(outcomes))
    return outcomes


def _place_sifted(connection: Connection, chunks: Sequence[Chunk]) -> list[Outcome]:
    """The same, but a line whose id is there already, or stood above, is set apart and compared afterwards.

    The ids to look for are read from the bytes, as the emitter writes them; the COPY fails for one that was
    missed by that. Raises psycopg.Error.
    """
    outcomes = [Outcome(chunk) for chunk in chunks]
    seen = _ids_there(connection, chunks)
    events: list[_Line] = []
    metrics: list[_Line] = []

    def new_ones() -> Iterator[_Line]:
        for line in _lines(outcomes):
            ids = seen[EVENTS.name if line.row.is_event else METRICS.name]
            if line.row.event_id not in ids:
                ids.add(line.row.event_id)
                yield line
            else:
                (events if line.row.is_event else metrics).append(line)

    _copy(connection, new_ones())
    _insert_apart(connection, events, metrics, iter(events), iter(metrics))
    return outcomes


def _ids_there(connection: Connection, chunks: Sequence[Chunk]) -> dict[str, set[str]]:
    """Return which of the ids that the chunks seem to have are there already, by table."""
    ids: dict[bytes, list[str]] = {b"event_type": [], b"metric_name": []}
    for chunk in chunks:
        for found in filter(None, map(_BEGINNING, chunk.lines())):
            ids[found[2]].append(found[1].decode())
    return {
        EVENTS.name: database.existing(connection, EVENTS, ids[b"event_type"]),
        METRICS.name: database.existing(connection, METRICS, ids[b"metric_name"]),
    }


def _lines(outcomes: Sequence[Outcome]) -> Iterator[_Line]:
    """Decode; the lines that have no row are rejected."""
    for outcome in outcomes:
        yield from _decode(outcome, outcome.chunk.lines())


def _copy(connection: Connection, lines: Iterator[_Line]) -> None:
    """Copy events as they come, then the metrics that stood between them."""
    metrics: list[str] = []

    def events() -> Iterator[str]:
        for line in lines:
            if line.row.is_event:
                line.outcome.events += 1
                yield line.row.copy
            else:
                line.outcome.metrics += 1
                metrics.append(line.row.copy)

    with connection.transaction():
        database.copy(connection, EVENTS, events())
        database.copy(connection, METRICS, metrics)


def _place_apart(
    connection: Connection, given: Sequence[tuple[Outcome, Iterable[bytes]]], staged: bool
) -> None:
    """Insert the rows of some lines that may be there already, or that Postgres may refuse, row by row.

    `staged` sends events while they are decoded, to where they are compared with what is there.
    """
    events: list[_Line] = []
    metrics: list[_Line] = []
    coming = _gather(given, events, metrics)
    if staged:
        _insert_apart(connection, events, metrics, coming, iter(metrics))
    else:
        _exhaust(coming)
        _insert_apart(connection, events, metrics)
    for outcome, _ in given:
        outcome.rejects.sort(key=lambda rejected: rejected.line)


def _insert_apart(
    connection: Connection, events: Sequence[_Line], metrics: Sequence[_Line],
    coming_events: Iterator[_Line] | None = None, coming_metrics: Iterator[_Line] | None = None,
) -> None:  # fmt: skip
    """Insert lines that may be duplicates or poison, and count what became of each."""
    for line in _insert(connection, EVENTS, events, coming_events):
        line.outcome.events += 1
    for line in _insert(connection, METRICS, metrics, coming_metrics):
        line.outcome.metrics += 1


def _gather(
    given: Sequence[tuple[Outcome, Iterable[bytes]]], events: list[_Line], metrics: list[_Line]
) -> Iterator[_Line]:
    """Decode, gather what has a row, and yield the events as they come."""
    for outcome, lines in given:
        for line in _decode(outcome, lines):
            if line.row.is_event:
                events.append(line)
                yield line
            else:
                metrics.append(line)


def _exhaust(coming: Iterable[_Line]) -> None:
    deque(coming, maxlen=0)


def _decode(outcome: Outcome, lines: Iterable[bytes]) -> Iterator[_Line]:
    """Yield the lines that have a row; the others are rejected."""
    chunk = outcome.chunk
    for number, raw in enumerate(lines, chunk.first_line):
        outcome.lines += 1
        row = _oversize(chunk) if chunk.oversize else decode(raw)
        if isinstance(row, Row):
            yield _Line(outcome, number, raw, row)
        else:
            outcome.reject(number, raw, row)


def _oversize(chunk: Chunk) -> Reject:
    return Reject(
        OVERSIZE, f"the line has {chunk.size} bytes; only its beginning is here, the whole is in the file"
    )


def _insert(
    connection: Connection, table: Table, lines: Sequence[_Line], coming: Iterator[_Line] | None = None
) -> Iterable[_Line]:
    """Insert rows and return the lines that are new; what Postgres refuses is isolated and rejected.

    `coming` gives the same lines one by one, of which some are expected to be there already.
    """
    try:
        if coming is not None:
            inserted = database.insert_staged(connection, table, (line.row for line in coming))
        elif lines:
            inserted = database.insert(connection, table, [line.row for line in lines])
        else:
            return ()
    except psycopg.Error as error:
        if action(error.sqlstate) is not Action.REJECT:
            raise
        _exhaust(coming or ())
        if len(lines) > 1:
            return [line for part in _split(lines, error) for line in _insert(connection, table, part)]
        (line,) = lines
        line.outcome.reject(line.number, line.raw, Reject(f"postgres_{error.sqlstate}", _message(error)))
        return ()
    placed = set(inserted.duplicates)
    for position in inserted.duplicates:
        lines[position].outcome.duplicates += 1
    for collision in inserted.collisions:
        line = lines[collision.position]
        reason = f"event_id {line.row.event_id} is taken by another payload: {collision.existing}"
        line.outcome.reject(line.number, line.raw, Reject("collision", reason))
        placed.add(collision.position)
    return [line for position, line in enumerate(lines) if position not in placed]


def _split(lines: Sequence[_Line], error: psycopg.Error) -> list[Sequence[_Line]]:
    """Parts that hold the offending rows apart: halves, and by itself the line that COPY names.

    A constraint names no line, so the name is a hint where to cut only; halves keep a chunk of nothing but
    offending rows from being sent once per row.
    """
    named = _COPY_LINE.search(error.diag.context or "")
    position = int(named[1]) - 1 if named else -1
    if 0 <= position < len(lines):
        sides = [*_halves(lines[:position]), lines[position : position + 1], *_halves(lines[position + 1 :])]
    else:
        sides = _halves(lines)
    return [part for part in sides if part]


def _halves(lines: Sequence[_Line]) -> list[Sequence[_Line]]:
    half = len(lines) // 2
    return [lines[:half], lines[half:]]


def _message(error: psycopg.Error) -> str:
    diagnostics = error.diag
    return ": ".join(filter(None, (diagnostics.message_primary or str(error), diagnostics.message_detail)))
