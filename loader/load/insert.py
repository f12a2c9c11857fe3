"""Inserts lines into the tables in one of four ways, each slower and more thorough than the previous one.

    direct          COPY while decoding; fails for any row that already exists or is refused
    deduplicating   the same, but rows whose id exists or is repeated are staged and compared
    comparing       every row is staged and compared
    isolating       like comparing; rows that Postgres refuses or does not store are found and rejected (isolate.py)

The first three fail as a whole. After a unique violation or a deadlock the next way is tried; an outage is
raised; any other error leads to `isolating`, also one specific to COPY (row-level security). On Citus every
error of a worker in a COPY is an XX000, so the next way is tried; in `isolating`, which inserts without COPY,
it means that a worker failed.
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
from loader.load.erasures import Erasures
from loader.load.isolate import insert_isolating
from loader.load.lowwater import Marks
from loader.load.outcome import Line, Outcome, decoded
from loader.load.sqlstate import concerns_no_row, is_internal, meets_new_partition
from loader.load.staging import Inserted, NotStoredError, Staging
from loader.load.tables import EVENTS, METRICS, Table
from loader.load.triggers import triggers

MANY_DUPLICATES: Final = 0.5
"""Share of duplicates from which comparing every row is cheaper than looking up existing ones (measured)."""
_BEGINNING: Final = re.compile(
    rb'\s*\{\s*"event_id"\s*:\s*"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"\s*,\s*"'
    rb"(event_type|metric_name)"
).match

_TRY_NEXT: Final = (psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected)
"""COPY inserts in the order of the lines, so two loaders with the same lines may deadlock."""

_Way = Callable[[Connection, Sequence[Outcome]], None]


def insert(
    connection: Connection,
    chunks: Sequence[Chunk],
    duplicates: float,
    erasures: Erasures | None,
    marks: Marks,
) -> list[Outcome]:
    """Insert the lines of some chunks. `duplicates` is the expected share of existing rows.

    Raises psycopg.Error if the rows are not at fault.
    """
    for way in _ways(duplicates):
        outcomes = [Outcome(chunk, erasures, marks) for chunk in chunks]
        try:
            with connection.transaction():
                way(connection, outcomes)
        except _TRY_NEXT:
            continue
        except NotStoredError:
            break
        except psycopg.Error as error:
            distributed = is_distributed(connection)
            if meets_new_partition(error) or (distributed and is_internal(error)):
                continue
            if concerns_no_row(error, distributed=distributed):
                raise
            break
        return outcomes
    outcomes = [Outcome(chunk, erasures, marks) for chunk in chunks]
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
    """Ids to look up are searched in the bytes, in the emitter's format; COPY fails for a missed one."""
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
    """Send events while they are decoded, so that the server works in parallel."""
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
    """Open a COPY for new lines: events are sent immediately, metrics at the end of the block."""
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
    """Return the ids found in the chunks that are keys of existing rows, by table."""
    ids: dict[bytes, list[str]] = {b"event_type": [], b"metric_name": []}
    for outcome in outcomes:
        for found in filter(None, map(_BEGINNING, outcome.chunk.lines())):
            ids[found[2]].append(found[1].decode())
    return {
        EVENTS: copying.existing_ids(connection, EVENTS, ids[b"event_type"]),
        METRICS: copying.existing_ids(connection, METRICS, ids[b"metric_name"]),
    }


def _settle(lines: Sequence[Line], inserted: Inserted) -> None:
    """Count the outcome of lines whose rows were inserted or compared."""
    for position in inserted.duplicates:
        lines[position].outcome.duplicates += 1
    for collision in inserted.collisions:
        line = lines[collision.position]
        reason = (
            f"event_id {line.row.event_id} belongs to a row with a different payload: {collision.existing}"
        )
        line.reject(Reject("collision", reason))
    for position, reject in inserted.refused.items():
        lines[position].reject(reject)
    for position in set(range(len(lines))) - inserted.positions():
        lines[position].insert()
