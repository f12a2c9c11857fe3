"""Erases people and families: rows, mentions, user days, rejects, archive, spool and exports; and verifies it.

    step                                a kill here leaves           repaired by
    ----------------------------------  ---------------------------  ---------------------------------------------
    tombstones, rows, user days         all of it, or nothing        the same command
    mentions, in batches of rows        the remaining mentions       the same command, or `--again`
    files, one at a time                the remaining files          the same command, or a loader on that host
    proof                               no proof                     `--verify`

Each step can be repeated safely. After the first COMMIT, every load discards the lines of these people.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

import orjson
import psycopg
from psycopg import sql

from loader.errors import LoaderError
from loader.files import erase as files
from loader.files import nofollow, rejects
from loader.files.erase import Swept
from loader.files.lock import exclusive, holder
from loader.files.mentions import Mentions
from loader.files.scan import scan
from loader.files.writing import is_complete
from loader.load import erasures
from loader.load.database import Connection, is_distributed, transaction
from loader.load.erasures import Erasures
from loader.operate import exports
from loader.operate.places import Places
from loader.service import erasures as service
from spool.segment import OPEN, SEALED

Kind = Literal["user", "family"]
UNREACHED: Final = (
    "the server's WAL, and free space in its files until it is overwritten",
    "replicas and backups: after a restore, run `loader erase --again`",
    "copies, exports and logs in other places than those listed",
)
_GROUP: Final = 1000
"""Maximum number of people whose rows are deleted in one transaction. Loads wait for it."""
_ROWS: Final = 500
"""Number of rows that are searched together and rewritten in one transaction."""
_WAIT_SECONDS: Final = 30.0
"""Seconds to wait, before a proof, for a running loader to load the remaining segments."""
_ERASE_ROWS: Final = "SELECT analytics_erase_rows(%s::uuid[], %s::text)"
_OWN_ROWS: Final = """
    SELECT (SELECT pg_catalog.count(*) FROM analytics_events
            WHERE user_id = ANY (%(ids)s::uuid[]) OR family_unit_id = ANY (%(ids)s::uuid[])
                OR event_id = ANY (%(ids)s::uuid[])),
        (SELECT pg_catalog.count(*) FROM analytics_metrics WHERE id = ANY (%(ids)s::uuid[])),
        (SELECT pg_catalog.count(*) FROM analytics_user_days
            WHERE user_id = ANY (%(ids)s::uuid[]) OR family_unit_id = ANY (%(ids)s::uuid[]))
"""
_RETURNED: Final = """
    SELECT DISTINCT found.id::text, kind FROM (
        SELECT user_id AS id FROM analytics_events UNION SELECT family_unit_id FROM analytics_events
        UNION SELECT user_id FROM analytics_user_days UNION SELECT family_unit_id FROM analytics_user_days
        UNION ALL SELECT event_id FROM analytics_events UNION ALL SELECT id FROM analytics_metrics
    ) AS found
    CROSS JOIN analytics_erasure_keys
    JOIN analytics_erasures ON subject = pg_catalog.sha256(key || pg_catalog.uuid_send(found.id))
    WHERE found.id IS NOT NULL
"""
"""Ids that have a tombstone and still have rows, for example after a restore."""
_COUNT_MENTIONS: Final = """
    UPDATE analytics_erasures SET mentions = mentions + counted
    FROM ROWS FROM (pg_catalog.unnest(%s::uuid[]), pg_catalog.unnest(%s::bigint[])) AS found (id, counted)
    CROSS JOIN analytics_erasure_keys
    WHERE subject = pg_catalog.sha256(key || pg_catalog.uuid_send(found.id))
"""
_ALONE: Final = "SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('analytics_erasures')::bigint)"
"""Citus locks no rows of several shards, so that another erasure could write back what this one replaces."""
_DONE: Final = """
    UPDATE analytics_erasures SET done_at = pg_catalog.now(), proof = coalesce(%s::jsonb, proof)
    WHERE subject = ANY (%s::bytea[])
"""


@dataclass
class Erased:
    """The result of an erasure or of a dry run. `failures` maps each unsearched file to the reason."""

    people: int = 0
    events: int = 0
    metrics: int = 0
    mentions: int = 0
    user_days: int = 0
    reject_lines: int = 0
    archive_lines: int = 0
    waiting_lines: int = 0
    export_lines: int = 0
    files: int = 0
    failures: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the counts by the names that `loader erase` prints."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}


@dataclass(frozen=True)
class Searched:
    """A searched table or directory: the bytes searched, and the number of rows or files with an id."""

    place: str
    bytes: int
    hits: int


@dataclass
class Proof:
    """The result of a search. `waiting` are segments whose lines are erased when they are loaded."""

    places: list[Searched] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether everything could be searched and nothing was found."""
        return not self.failures and not any(place.hits for place in self.places)

    def facts(self) -> dict[str, Any]:
        """Return the proof as it is printed and stored."""
        return {
            "searched_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "places": [vars(place) for place in self.places],
            "waiting": self.waiting, "failures": self.failures, "unreached": list(UNREACHED),
        }  # fmt: skip


class Erasure:
    """Erases people by their ids. Methods raise psycopg.Error, OSError and LoaderError."""

    def __init__(self, connection: Connection, places: Places, people: Sequence[tuple[Kind, UUID]]) -> None:
        self.erased = Erased(people=len(people))
        self._connection = connection
        self._places = places
        self._people = people
        self._mentions = Mentions(ids=(each.bytes for _, each in people))

    def count(self) -> Erased:
        """Count what would be erased."""
        with _versioned(), transaction(self._connection):
            values = {"ids": (ids := [str(each) for _, each in self._people])}
            ((events, metrics, days),) = self._connection.execute(_OWN_ROWS, values).fetchall()
            self.erased.events, self.erased.metrics, self.erased.user_days = events, metrics, days
        self.erased.mentions = sum(len(keys) for _, keys in _mentioned(self._connection, self._mentions, ids))
        _add_files(self.erased, _dry_files(self._places, self._mentions))
        return self.erased

    def run(self) -> Erased:
        """Erase them."""
        for kind in ("user", "family"):
            ids = [each for which, each in self._people if which == kind]
            for begin in range(0, len(ids), _GROUP):
                self._erase_rows(ids[begin : begin + _GROUP], kind)
        self.erased.mentions += redact(self._connection, self._mentions)
        self._sweep_files()
        return self.erased

    def subjects(self) -> list[bytes]:
        """Return the subjects (hashes of the ids) of their tombstones."""
        statement = (
            "SELECT pg_catalog.sha256(key || pg_catalog.uuid_send(id)) "
            "FROM pg_catalog.unnest(%s::uuid[]) AS id CROSS JOIN analytics_erasure_keys"
        )
        with transaction(self._connection):
            found = self._connection.execute(statement, [[str(each) for _, each in self._people]])
            return [subject for (subject,) in found]

    @property
    def mentions(self) -> Mentions:
        """The matcher for their ids."""
        return self._mentions

    def _erase_rows(self, ids: Sequence[UUID], kind: str) -> None:
        with _versioned(), transaction(self._connection):
            ((counts,),) = self._connection.execute(
                _ERASE_ROWS, [[str(each) for each in ids], kind]
            ).fetchall()
        self.erased.events += counts["events"]
        self.erased.metrics += counts["metrics"]
        self.erased.user_days += counts["user_days"]

    def _sweep_files(self) -> None:
        with transaction(self._connection):
            seen = erasures.seen(self._connection)
        assert seen is not None  # a tombstone exists
        _add_files(self.erased, sweep_files(self._connection, self._places, seen))


class Again(Erasure):
    """Applies all tombstones again, for example after a restore. First restores tombstones that only files have."""

    def __init__(self, connection: Connection, places: Places) -> None:
        super().__init__(connection, places, ())
        with _versioned(), transaction(connection):
            _restore(connection, places)
            seen = erasures.current(connection)
            found = connection.execute(_RETURNED).fetchall()
        self._mentions = self._seen = seen or erasures.NOBODY
        self._people = [(kind, UUID(each)) for each, kind in found]
        self.erased.people = len(self._seen.kinds)

    def subjects(self) -> list[bytes]:
        return list(self._seen.kinds)


# ---- rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Documents:
    """A table with a JSON document that may mention people, its key, and another column that may contain an id."""

    table: str
    key: str
    document: str
    other: str
    source: str


_EVENTS: Final = _Documents("analytics_events", "event_id", "metadata", "session_id", "events")
_METRICS: Final = _Documents("analytics_metrics", "id", "labels", "NULL::uuid", "metrics")
_KEY_LENGTH: Final = 36
_OTHERS: Final = (
    " WHERE coalesce(user_id <> ALL ({own}::uuid[]), true) AND coalesce(family_unit_id <> ALL ({own}::uuid[]), true) "
    "AND event_id <> ALL ({own}::uuid[])"
)


def redact(connection: Connection, mentions: Mentions) -> int:
    """Replace the ids by zeros in the rows of other people; return the number of rows. Raises psycopg.Error."""
    if not mentions:
        return 0
    total = 0
    for documents, keys in _mentioned(connection, mentions, []):
        for begin in range(0, len(keys), _ROWS):
            total += _redact_rows(connection, documents, keys[begin : begin + _ROWS], mentions)
    _redact_texts(connection, mentions)
    return total


def _mentioned(
    connection: Connection, mentions: Mentions, own: Sequence[str]
) -> Iterator[tuple[_Documents, list[str]]]:
    """Yield each table with the keys of rows that mention one of the people, except rows of `own` ids."""
    for documents in (_EVENTS, _METRICS):
        query = sql.SQL("SELECT {}::text, {}, {}::text FROM {}").format(
            sql.Identifier(documents.key), sql.SQL(documents.other),
            sql.Identifier(documents.document), sql.Identifier(documents.table),
        )  # fmt: skip
        if documents is _EVENTS and own:
            query += sql.SQL(_OTHERS).format(own=sql.Literal(own))
        found: list[str] = []
        with transaction(connection):
            for rows in _copied(connection, query):
                if mentions.concern(b"".join([row[_KEY_LENGTH:] for row in rows])):
                    found += [
                        row[:_KEY_LENGTH].decode() for row in rows if mentions.concern(row[_KEY_LENGTH:])
                    ]
        yield documents, found


def _copied(connection: Connection, query: sql.Composable) -> Iterator[list[bytes]]:
    """Yield the rows of a query in batches, in COPY's text format."""
    rows: list[bytes] = []
    with connection.cursor().copy(sql.SQL("COPY ({}) TO STDOUT").format(query)) as copied:
        for row in copied:
            rows.append(bytes(row))
            if len(rows) == _ROWS:
                yield rows
                rows = []
    if rows:
        yield rows


def _redact_rows(
    connection: Connection, documents: _Documents, keys: Sequence[str], mentions: Mentions
) -> int:
    names = {
        "table": sql.Identifier(documents.table), "key": sql.Identifier(documents.key),
        "document": sql.Identifier(documents.document), "other": sql.SQL(documents.other),
    }  # fmt: skip
    read = sql.SQL(
        "SELECT {key}::text, {document}::text, {other}::text FROM {table} "
        "WHERE {key} = ANY (%s::uuid[]) ORDER BY {key} {lock}"
    ).format(**names, lock=sql.SQL("" if is_distributed(connection) else "FOR UPDATE"))
    setting = sql.SQL("{document} = new.content::jsonb").format(**names)
    if documents is _EVENTS:
        setting += sql.SQL(", session_id = new.other")
    write = sql.SQL(
        "WITH changed AS (UPDATE {table} AS each SET {setting} "
        "FROM ROWS FROM (pg_catalog.unnest(%s::uuid[]), "
        "pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::uuid[])) AS new (key, content, other) "
        "WHERE each.{key} = new.key RETURNING each.timestamp) "
        "INSERT INTO analytics_touched (hour, source) "
        "SELECT DISTINCT pg_catalog.date_trunc('hour', timestamp, 'UTC'), {source} FROM changed "
        "WHERE pg_catalog.isfinite(timestamp)"
    ).format(**names, setting=setting, source=sql.Literal(documents.source))
    counted: Counter[bytes] = Counter()
    with transaction(connection):
        if is_distributed(connection):
            connection.execute(_ALONE)
        rows = []
        for key, content, other in connection.execute(read, [list(keys)]).fetchall():
            before = f"{content}\t{other}".encode()
            counted.update(set(mentions.ids_in(before)))
            now = [_redacted_document(content, mentions), _redacted_text(other, mentions)]
            if now != [content, other]:
                rows.append((key, *now))
        if rows:
            connection.execute(write, [list(column) for column in zip(*rows, strict=True)])
            ids = [str(UUID(bytes=each)) for each in counted]
            connection.execute(_COUNT_MENTIONS, [ids, list(counted.values())])
    return len(rows)


def _redacted_document(content: str | None, mentions: Mentions) -> str | None:
    redacted = _redacted_text(content, mentions)
    if redacted is None or redacted == content:
        return content
    try:
        orjson.loads(redacted)
    except orjson.JSONDecodeError:
        return "{}"  # the digits were part of a number, so the result is not JSON
    return redacted


def _redacted_text(text: str | None, mentions: Mentions) -> str | None:
    return None if text is None else mentions.redacted(text.encode()).decode()


def _redact_texts(connection: Connection, mentions: Mentions) -> None:
    """Replace the ids in file names and in the labels of rollups, whose rows may already be pruned."""
    for table, column, kind in (
        ("analytics_hourly_metrics", "labels", "jsonb"), ("analytics_loads", "file", "text"),
    ):  # fmt: skip
        names = {"table": sql.Identifier(table), "column": sql.Identifier(column), "kind": sql.SQL(kind)}
        read = sql.SQL("SELECT DISTINCT {column}::text FROM {table} WHERE {column} IS NOT NULL").format(
            **names
        )
        write = sql.SQL("UPDATE {table} SET {column} = %s::{kind} WHERE {column} = %s::{kind}").format(
            **names
        )
        with transaction(connection):
            texts = [text for (text,) in connection.execute(read)]
            if kind == "jsonb":
                changed = [(_redacted_document(text, mentions), text) for text in texts]
            else:
                changed = [(_redacted_text(text, mentions), text) for text in texts]
            for now, before in changed:
                if now != before:
                    connection.execute(write, [now, before])


def vacuum(connection: Connection) -> None:
    """Vacuum deleted rows, except in tables that another session has locked. Raises psycopg.Error."""
    with transaction(connection):
        tables = [
            sql.Identifier(name, table)
            for name, table in connection.execute(
                "SELECT nspname::text, relname::text FROM pg_catalog.pg_class "
                "JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace "
                "WHERE pg_class.oid = ANY (ARRAY[pg_catalog.to_regclass('analytics_events')::pg_catalog.oid, "
                "pg_catalog.to_regclass('analytics_metrics')::pg_catalog.oid, "
                "pg_catalog.to_regclass('analytics_user_days')::pg_catalog.oid])"
            )
        ]
    before, connection.autocommit = connection.autocommit, True
    try:
        connection.execute(sql.SQL("VACUUM (SKIP_LOCKED) {}").format(sql.SQL(", ").join(tables)))
    finally:
        connection.autocommit = before


# ---- files ------------------------------------------------------------------------------------------


def sweep_files(connection: Connection, places: Places, seen: Erasures) -> dict[str, Swept]:
    """Remove people from all files. If a loader runs on this spool, its pending segments are left to that loader.

    That loader then also records the applied erasures: it may be retiring files that it read before the erasure.
    """
    with contextlib.ExitStack() as held:
        alone = True
        try:
            held.enter_context(exclusive(places.spool))
        except LoaderError:
            alone = False
        swept = {
            "waiting": _sweep_waiting(places.spool, seen) if alone else Swept(),
            "reject": erasures.sweep_rejects(connection, places.spool, seen),
            "archive": files.sweep(places.archive, seen) if places.archive else Swept(),
            "export": _sweep_exports(places, seen, dry_run=False),
        }
        if alone:
            for root, name in ((places.spool, "reject"), (places.archive, "archive")):
                if root is not None and not swept[name].failures:
                    service.note_applied(root, seen)
    return swept


def _sweep_waiting(spool: Path, mentions: Mentions) -> Swept:
    """Remove people from sealed segments, also those of dead writers; skip segments that may still be written."""
    swept = Swept()
    scan(spool)
    with nofollow.opened(spool) as directory:
        for name in nofollow.names(directory, (SEALED,)):
            with files.noting(swept, name):
                with nofollow.open_file(name, directory) as file:
                    if not is_complete(file.fileno()):
                        continue  # its lines are erased when they are loaded
                files.sweep_file(directory, name, mentions, swept)
    return swept


def _sweep_exports(places: Places, mentions: Mentions, *, dry_run: bool) -> Swept:
    swept = Swept()
    for root in places.exports:
        swept += exports.sweep(root, mentions, dry_run=dry_run)
    return swept


def _dry_files(places: Places, mentions: Mentions) -> dict[str, Swept]:
    return {
        "waiting": files.sweep_named(places.spool, (SEALED, OPEN), mentions, dry_run=True),
        "reject": erasures.search_rejects(places.spool, mentions),
        "archive": files.sweep(places.archive, mentions, dry_run=True) if places.archive else Swept(),
        "export": _sweep_exports(places, mentions, dry_run=True),
    }


def _add_files(erased: Erased, swept: dict[str, Swept]) -> None:
    for name, each in swept.items():
        lines = f"{name}_lines"
        setattr(erased, lines, getattr(erased, lines) + each.lines + each.mentions)
        erased.files += each.files
        erased.failures |= each.failures


def _restore(connection: Connection, places: Places) -> None:
    """Restore tombstones that the database lost in a restore, from the copies beside the files."""
    for root in (places.spool, *([places.archive] if places.archive else [])):
        known = files.state(root)
        if not known.kinds:
            continue
        connection.execute(_ALONE)
        connection.execute(
            "INSERT INTO analytics_erasure_keys (key) SELECT pg_catalog.unnest(%s::bytea[]) ON CONFLICT DO NOTHING",
            [list(known.keys)],
        )
        connection.execute(
            "INSERT INTO analytics_erasures (subject, kind) "
            "SELECT * FROM ROWS FROM (pg_catalog.unnest(%s::bytea[]), pg_catalog.unnest(%s::text[])) "
            "ON CONFLICT DO NOTHING",
            [list(known.kinds), list(known.kinds.values())],
        )


@contextlib.contextmanager
def _versioned() -> Iterator[None]:
    try:
        yield
    except (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable) as error:
        raise LoaderError(
            "the tables do not support erasures yet: run `loader init` as their owner"
        ) from error


# ---- proof ------------------------------------------------------------------------------------------


def prove(connection: Connection, places: Places, mentions: Mentions) -> Proof:
    """Search every table and file. Raises psycopg.Error, OSError.

    Waits for segments that a running writer has open or that a loader is about to load.
    """
    proof = Proof(places=list(_searched_tables(connection, mentions)))
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        searched = _searched_files(places, mentions, proof)
        if not any(each.hits for each in searched) or time.monotonic() > deadline or not holder(places.spool):
            break
        time.sleep(0.5)  # until the running loader has loaded the remaining segments
    proof.places += searched
    return proof


def note(connection: Connection, subjects: Sequence[bytes], proof: Proof | None) -> None:
    """Record in the tombstones that an erasure is complete, with its proof. Raises psycopg.Error."""
    content = None if proof is None else orjson.dumps(proof.facts()).decode()
    with transaction(connection):
        connection.execute(_DONE, [content, list(subjects)])


def _searched_tables(connection: Connection, mentions: Mentions) -> Iterator[Searched]:
    with transaction(connection):
        tables = connection.execute(
            "SELECT relname::text FROM pg_catalog.pg_class WHERE relnamespace = (SELECT relnamespace "
            "FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid) "
            "AND relkind = ANY (ARRAY['r', 'p', 'm']::\"char\"[]) AND NOT relispartition "
            "AND pg_catalog.starts_with(relname::text, 'analytics_') ORDER BY 1"
        ).fetchall()
        for (table,) in tables:
            query = sql.SQL("SELECT each::text FROM {} AS each").format(sql.Identifier(table))
            size = hits = 0
            for rows in _copied(connection, query):
                joined = b"".join(rows)
                size += len(joined)
                if mentions.concern(joined):
                    hits += sum(mentions.concern(row) for row in rows)
            yield Searched(f"table {table}", size, hits)


def _searched_files(places: Places, mentions: Mentions, proof: Proof) -> list[Searched]:
    proof.waiting, proof.failures = [], {}
    spool = files.search(places.spool, mentions, (rejects.DIRECTORY, *_inside(places)))
    proof.waiting = spool.found
    rejected = erasures.search_rejects(places.spool, mentions)
    rejected += files.search(places.spool / rejects.DIRECTORY, mentions)
    found = {f"spool {places.spool}": spool, f"rejects {places.spool / rejects.DIRECTORY}": rejected}
    if places.archive:
        found[f"archive {places.archive}"] = files.search(places.archive, mentions)
    for root in places.exports:
        found[f"exports {root}"] = exports.sweep(root, mentions, dry_run=True)
    for swept in found.values():
        proof.failures |= swept.failures
    return [Searched(place, swept.bytes, swept.hits) for place, swept in found.items()]


def _inside(places: Places) -> Iterator[str]:
    """Yield the subdirectories of the spool that are searched separately."""
    for root in (places.archive, *places.exports):
        if root is not None and root.is_relative_to(places.spool):
            yield root.relative_to(places.spool).parts[0]
