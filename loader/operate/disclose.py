"""Disclosure of all data about a person, with its source: rows, mentions, spool, rejects and archive.

Every table and every byte is searched in the same way as by an erasure (loader.files.mentions), so the disclosed data
is the data that would be erased. Each line of the output is a JSON object. `_source` is a table or a file, `_line` the
line number in the file. `_found` is "own", or "mention" if the record belongs to somebody else. A mention contains
the other person's data: review it before you hand it over.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final
from uuid import UUID

import orjson
from psycopg import sql

from loader.files import erase, nofollow, rejects
from loader.files.content import Reader, unpacked
from loader.files.erase import Swept
from loader.files.mentions import OVERLAP, Mentions
from loader.load.database import Connection, transaction
from loader.operate.places import Places

_TABLES: Final = (
    "SELECT relname::text, pg_catalog.has_table_privilege(oid, 'SELECT') FROM pg_catalog.pg_class "
    "WHERE relnamespace = (SELECT relnamespace FROM pg_catalog.pg_class "
    "WHERE oid = pg_catalog.to_regclass('analytics_events')::pg_catalog.oid) "
    "AND relkind = ANY (ARRAY['r', 'p', 'm']::\"char\"[]) AND NOT relispartition "
    "AND pg_catalog.starts_with(relname::text, 'analytics_') ORDER BY 1"
)
_WITHOUT_PEOPLE: Final = ("analytics_erasures", "analytics_erasure_keys")
"""Tables that a reader has no privilege to read: the keyed hashes of erased people."""
_BLOCK: Final = 1 << 20
_LONGEST: Final = 16 << 20
"""Maximum number of bytes disclosed of a line. Only the beginning of a longer line is disclosed."""


@dataclass
class Disclosed:
    """The records found, by kind of source. `failures` maps each unsearched table or file to the reason."""

    records: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the counts by the names that `loader export --user` prints."""
        return {name: self.records[name] for name in ("rows", "spool_lines", "reject_lines", "archive_lines")}


def disclose(connection: Connection, places: Places, person: UUID, target: IO[bytes]) -> Disclosed:
    """Write all data about a person to `target`. Raises psycopg.Error, OSError."""
    disclosed, mentions = Disclosed(), Mentions(ids=[person.bytes])
    swept = Swept()
    for name, records in (
        ("rows", _rows(connection, mentions, disclosed)),
        ("spool_lines", _spool(places, mentions, swept)),
        ("reject_lines", _rejects(places.spool, mentions, swept)),
        ("archive_lines", _files("archive", places.archive, mentions, swept) if places.archive else ()),
    ):
        for record in records:
            target.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            disclosed.records[name] += 1
    disclosed.failures |= swept.failures
    return disclosed


def _rows(connection: Connection, mentions: Mentions, disclosed: Disclosed) -> Iterator[dict[str, Any]]:
    with transaction(connection, "REPEATABLE READ"):  # one snapshot for all tables
        for table, readable in connection.execute(_TABLES).fetchall():
            if not readable and table not in _WITHOUT_PEOPLE:
                disclosed.failures[f"table {table}"] = (
                    "was not searched: this role lacks the SELECT privilege"
                )
            elif readable:
                for row in _table(connection, table, mentions):
                    yield {"_source": f"table {table}", **_kind(row, mentions), **orjson.loads(row)}


def _table(connection: Connection, table: str, mentions: Mentions) -> Iterator[bytes]:
    """Yield the rows that contain the person, as JSON. JSON never contains the two control characters used here."""
    query = sql.SQL(
        "COPY (SELECT pg_catalog.row_to_json(each) FROM {} AS each) TO STDOUT "
        "(FORMAT csv, QUOTE E'\\x01', ESCAPE E'\\x01', DELIMITER E'\\x02')"
    ).format(sql.Identifier(table))
    with connection.cursor().copy(query) as copied:
        for block in copied:
            row = bytes(block)
            if mentions.concern(row):
                yield row


def _kind(line: bytes, mentions: Mentions) -> dict[str, str]:
    return {"_found": "own" if mentions.applied(line) is None else "mention"}


def _spool(places: Places, mentions: Mentions, swept: Swept) -> Iterator[dict[str, Any]]:
    """Yield lines of the open and sealed segments, and of all other files directly in the spool."""
    with erase.noting(swept, str(places.spool)), nofollow.opened(places.spool) as directory:
        for name in nofollow.names(directory, ("",)):
            yield from _file(directory, name, f"spool/{name}", mentions, swept)


def _rejects(spool: Path, mentions: Mentions, swept: Swept) -> Iterator[dict[str, Any]]:
    for path in rejects.files(spool):
        source = f"{rejects.DIRECTORY}/{path.name}"
        with erase.noting(swept, source):
            for number, rejected in enumerate(rejects.read(path), 1):
                texts = (rejected.file, rejected.code, rejected.reason)
                if mentions.concern(rejected.raw) or any(map(mentions.in_text, texts)):
                    reject = {"file": rejected.file, "code": rejected.code, "reason": rejected.reason}
                    found = {"_source": source, "_line": number, **_kind(rejected.raw, mentions)}
                    yield {**found, **reject, **_content(rejected.raw)}
    with erase.noting(swept, rejects.DIRECTORY), nofollow.opened(spool / rejects.DIRECTORY) as directory:
        for name in nofollow.names(directory, (rejects.WHOLE,)):
            yield from _file(directory, name, f"{rejects.DIRECTORY}/{name}", mentions, swept)


def _files(place: str, root: Path, mentions: Mentions, swept: Swept) -> Iterator[dict[str, Any]]:
    for directory, name, shown in erase.walk(root, swept):
        yield from _file(directory, name, f"{place}/{shown}", mentions, swept)


def _file(
    directory: int, name: str, source: str, mentions: Mentions, swept: Swept
) -> Iterator[dict[str, Any]]:
    with erase.noting(swept, source), nofollow.open_file(name, directory) as file:
        if not erase.is_found(file, mentions, Swept()):
            return
        file.seek(0)
        for number, (line, found) in enumerate(_lines(unpacked(file), mentions), 1):
            if found:
                yield {"_source": source, "_line": number, **_kind(line, mentions), **_content(line)}


def _lines(reader: Reader, mentions: Mentions) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, or the beginning of a longer one, and whether the person is in it."""
    rest, head, found = b"", b"", False
    while piece := reader.read(_BLOCK):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield head or line, found or mentions.concern(line)
            head, found = b"", False
        if len(rest) > _LONGEST:
            head, found = head or rest, found or mentions.concern(rest)
            rest = rest[-OVERLAP:]
    if head or rest.strip(b"\0"):
        yield head or rest, found or mentions.concern(rest)


def _content(line: bytes) -> dict[str, Any]:
    """Return a line as JSON if possible, otherwise as text, otherwise as base64."""
    try:
        return {"line": orjson.loads(line)}
    except orjson.JSONDecodeError:
        pass
    try:
        return {"raw": line.rstrip(b"\0").decode()}
    except UnicodeDecodeError:
        return {"raw_base64": base64.b64encode(line).decode()}
