"""Three people with lines in every place, and an independent implementation of the searches for them."""

from __future__ import annotations

import gzip
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard

from loader.load.database import Connection
from tests.load.lines import event, metric, rows
from tests.processes import Cli

ANNA, BERT, CARL = (uuid.UUID(f"{digit * 8}-aaaa-4bbb-8ccc-abcdef{digit * 6}") for digit in "123")
"""People; their digits have letters, so that upper case is another spelling."""
HOME, OTHER_HOME = (uuid.UUID(f"{digit * 8}-dddd-4eee-8fff-abcdef{digit * 6}") for digit in "78")
OTHERS = (
    "SELECT event_id, user_id, family_unit_id, session_id, metadata::text FROM analytics_events ORDER BY 1"
)


def spellings(person: uuid.UUID) -> list[str]:
    """The spellings of an id."""
    canonical, digits = str(person), person.hex
    odd = "-".join(digits[place : place + 4] for place in range(0, 32, 4))
    return [
        canonical,
        digits,
        canonical.upper(),
        digits.upper(),
        f"{{{canonical}}}",
        f"urn:uuid:{canonical}",
        odd,
    ]


def of(person: uuid.UUID, number: int, home: uuid.UUID = HOME, **change: object) -> bytes:
    """An event of a person."""
    return event(number, user_id=str(person), family_unit_id=str(home), **change)


def mentioning(person: uuid.UUID, begin: int, who: uuid.UUID = BERT) -> list[bytes]:
    """Events and metrics of others that mention a person in every spelling and place."""
    lines = []
    for place, text in enumerate(spellings(person)):
        metadata = {"child_id": text, "path": f"/users/{text}/x", text: 1, "deep": [{"a": [f"face-{text}"]}]}
        lines += [
            of(who, begin + 2 * place, metadata=metadata),
            metric(begin + 2 * place + 1, labels={"family_unit_id": text, "url": f"/u/{text}"}),
        ]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in str(person))
    raw = of(who, begin + 30, metadata={"child_id": "ESCAPED"}).replace(b"ESCAPED", escaped.encode())
    return [*lines, raw, of(who, begin + 31, session_id=str(person))]


def content(path: Path) -> bytes:
    """The bytes of a file without compression."""
    data = path.read_bytes()
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def plain(data: bytes) -> str:
    """Text in which an id is its 32 digits, however it was written."""
    text = data.decode("utf-8", "replace")
    text = re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
    return text.replace("-", "").lower()


def files(*roots: Path) -> Iterator[Path]:
    for root in roots:
        yield from (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())


def found_in_files(person: uuid.UUID, *roots: Path) -> list[str]:
    """The files that contain an id of a person, also in their names."""
    return [
        path.name
        for path in files(*roots)
        if person.hex in plain(content(path)) or person.hex in plain(path.name.encode())
    ]


def found_in_tables(connection: Connection, person: uuid.UUID) -> list[str]:
    """The tables that contain an id of a person: every row of each is searched as text."""
    tables = rows(
        connection, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'analytics%'"
    )
    return [
        name
        for (name,) in tables
        if any(
            person.hex in plain(text.encode())
            for (text,) in rows(connection, f"SELECT each::text FROM {name} AS each")
        )
    ]


def balanced(connection: Connection) -> None:
    """The ledger counts each line once, and its rows are those that were deleted or exist."""
    ((wrong,),) = rows(
        connection,
        "SELECT count(*) FROM analytics_loads WHERE lines <> events + metrics + duplicates + rejected + erased",
    )
    assert wrong == 0
    ((missing,),) = rows(connection, "SELECT count(*) FROM analytics_conservation WHERE missing <> 0")
    assert missing == 0


def counted(connection: Connection, column: str) -> int:
    ((number,),) = rows(connection, f"SELECT coalesce(sum({column}), 0)::bigint FROM analytics_loads")
    return int(number)


def facts(cli: Cli, *arguments: str | Path, code: int | None = 0) -> dict[str, object]:
    """Return the output of `loader erase --json`, run as the owner."""
    printed = cli.owner().run("erase", *map(str, arguments), "--json")
    assert code in (None, printed.returncode), printed.stdout.decode() + printed.stderr.decode()
    found: dict[str, object] = orjson.loads(printed.stdout)
    return found
