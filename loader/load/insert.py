"""Lines into the tables: three ways, each slower and more thorough than the one before.

    direct          COPY while decoding; fails for any row that exists or is refused
    deduplicating   the same, but rows whose id exists or occurred before are staged and compared
    comparing       every row is staged and compared
    isolating       as comparing; what Postgres refuses or does not keep is found and rejected (isolate.py)

The first three fail as a whole. A unique violation or a deadlock leads to the next way, an outage to the
caller, and any other error to `isolating`: also one that only COPY has (row-level security). On Citus every
error that a worker has in a COPY is an XX000, so that leads to the next way; in `isolating`, which inserts
without COPY, it means that a worker failed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import psycopg
from psycopg import sql

from loader.files.chunk import Chunk
from loader.load import copying, staging
from loader.load.database import Connection, is_distributed
from loader.load.decode import Reject
from loader.load.isolate import insert_isolating
from loader.load.outcome import Line, Outcome, decoded
from loader.load.sqlstate import concerns_no_row, is_internal
from loader.load.staging import Inserted, NotStoredError, Staging
from loader.load.tables import EVENTS, METRICS, Table
from loader.load.triggers import triggers

MANY_DUPLICATES: Final = 0.5
"""Share from which on comparing every row costs less than looking up those that exist (measured)."""
_BEGINNING: Final = re.compile(
    rb'\s*\{\s*"event_id"\s*:\s*"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"\s*,\s*"'
    rb"(event_type|metric_name)"
).match

_TRY_NEXT: Final = (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected)
"""COPY inserts in the order of the lines: two loaders with the same lines may wait for each other."""

_Way = Callable[[Connection, Sequence[Outcome]], None]


def insert(connection: Connection, chunks: Sequence[Chunk], duplicates: float) -> list[Outcome]:
    """Insert the lines of some chunks. `duplicates` is the share that is expected to exist.

    Raises psycopg.Error if the rows are not at fault.
    """
    for way in _ways(duplicates):
        outcomes = [Outcome(chunk) for chunk in chunks]
        try:
            with connection.transaction():
                way(connection, outcomes)
        except _TRY_NEXT:
            continue
        except NotStoredError:
            break
        except psycopg.Error as error:
            distributed = is_distributed(connection)
            if distributed and is_internal(error):
                continue
            if concerns_no_row(error, distributed=distributed):
                raise
            break
        return outcomes
    outcomes = [Outcome(chunk) for chunk in chunks]
    insert_lines(connection, list(decoded(outcomes)))
    return outcomes


def _ways(duplicates: float) -> tuple[_Way, ...]:
    if duplicates >= MANY_DUPLICATES:
        return (_comparing,)
    return (_deduplicating, _comparing) if duplicates else (_direct, _deduplicating, _comparing)


# ---- the ways ---------------------------------------------------------------------------------------


def _direct(connection: Connection, outcomes: Sequence[Outcome]) -> None:
    with _copying_lines(connection) as write:
        for line in decoded(outcomes):
            write(line)


def _deduplicating(connection: Connection, outcomes: Sequence[Outcome]) -> None:
    """Ids to look up are read from the bytes, as the emitter writes them; COPY fails for one it missed."""
    seen = _existing_ids(connection, outcomes)
    repeated: dict[Table, list[Line]] = {EVENTS: [], METRICS: []}
    with _copying_lines(connection) as write:
        for line in decoded(outcomes):
            row = line.row
            if row.event_id in seen[row.table]:
                repeated[row.table].append(line)
            else:
                seen[row.table].add(row.event_id)
                write(line)
    for table, lines in repeated.items():
        if lines:
            _settle(lines, staging.insert_staged(connection, table, (line.row for line in lines)))


def _comparing(connection: Connection, outcomes: Sequence[Outcome]) -> None:
    """Send events while they are decoded, so that the server works at the same time."""
    events: list[Line] = []
    metrics: list[Line] = []
    staged = Staging(connection, EVENTS)
    with staged.filling() as writer:
        for line in decoded(outcomes):
            if line.row.table is EVENTS:
                events.append(line)
                writer.write(line.row)
            else:
                metrics.append(line)
    _settle(events, staged.insert())
    if metrics:
        _settle(metrics, staging.insert_staged(connection, METRICS, (line.row for line in metrics)))


def insert_lines(connection: Connection, lines: Sequence[Line]) -> None:
    """Insert decoded lines, and reject those that Postgres refuses. Raises psycopg.Error for other errors."""
    for table in (EVENTS, METRICS):
        if own := [line for line in lines if line.row.table is table]:
            _settle(own, insert_isolating(connection, table, [line.row for line in own]))
    for outcome in {id(line.outcome): line.outcome for line in lines}.values():
        outcome.sort_rejects()


# ---- steps ------------------------------------------------------------------------------------------


@contextmanager
def _copying_lines(connection: Connection) -> Iterator[Callable[[Line], None]]:
    """Open a COPY of lines that are new: events go as they come, metrics when the block ends."""
    metrics: list[str] = []
    ids: dict[Table, list[str]] = {EVENTS: [], METRICS: []}
    with copying.copying(connection, sql.Identifier(EVENTS.name), EVENTS.columns) as events:

        def write(line: Line) -> None:
            row = line.row
            line.outcome.insert(row)
            ids[row.table].append(row.event_id)
            if row.table is EVENTS:
                events.write(row.copy)
            else:
                metrics.append(row.copy)

        yield write
    if metrics:
        copying.copy(connection, METRICS, metrics)
    for table, sent in ids.items():
        if sent and triggers(connection, table) and copying.any_missing(connection, table, sent):
            raise NotStoredError


def _existing_ids(connection: Connection, outcomes: Sequence[Outcome]) -> dict[Table, set[str]]:
    """Return which of the ids that the chunks seem to have are the key of a row, by table."""
    ids: dict[bytes, list[str]] = {b"event_type": [], b"metric_name": []}
    for outcome in outcomes:
        for found in filter(None, map(_BEGINNING, outcome.chunk.lines())):
            ids[found[2]].append(found[1].decode())
    return {
        EVENTS: copying.existing_ids(connection, EVENTS, ids[b"event_type"]),
        METRICS: copying.existing_ids(connection, METRICS, ids[b"metric_name"]),
    }


def _settle(lines: Sequence[Line], inserted: Inserted) -> None:
    """Count what became of lines whose rows were inserted or compared."""
    for position in inserted.duplicates:
        lines[position].outcome.duplicates += 1
    for collision in inserted.collisions:
        line = lines[collision.position]
        reason = f"event_id {line.row.event_id} is taken by another payload: {collision.existing}"
        line.reject(Reject("collision", reason))
    for position, reject in inserted.refused.items():
        lines[position].reject(reject)
    for position in set(range(len(lines))) - inserted.positions():
        lines[position].insert()
