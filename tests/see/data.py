"""Events and requests of twelve weeks in which three time zones change their clocks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from loader.load.database import Connection

ZONES: Final = ("America/New_York", "Europe/Berlin", "Australia/Sydney")
"""Their clocks change on 2 November, 26 October and 5 October 2025."""
CHANGES: Final = tuple(
    datetime(2025, *moment, tzinfo=UTC) for moment in ((11, 2, 6), (10, 26, 1), (10, 4, 16))
)
FIRST: Final = datetime(2025, 9, 1, tzinfo=UTC)
LAST: Final = datetime(2025, 11, 24, tzinfo=UTC)
TYPES: Final = ("user_registered", "feed_viewed", "memory_viewed", "reaction_created", "comment_created")
ENDPOINTS: Final = (("/feed", "GET"), ("/memories/{id}", "GET"), ("/memories", "POST"))


@dataclass(frozen=True)
class Event:
    event_type: str
    at: datetime
    user: UUID
    family: UUID
    session: UUID | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    created: datetime = LAST


@dataclass(frozen=True)
class Metric:
    name: str
    at: datetime
    value: float
    labels: dict[str, str]


def identifier(kind: int, number: int) -> UUID:
    return UUID(f"{kind:08x}-0000-4000-8000-{number:012x}")


def events(seed: int, users: int = 90) -> list[Event]:
    """Return sessions of users, many of them around clock changes and local midnights."""
    rng = random.Random(seed)
    made: list[Event] = []
    for user in range(users):
        begin = FIRST + timedelta(hours=rng.randrange(0, 60 * 24))
        for number in range(rng.randrange(1, 25)):
            start = _start(rng, begin) if number else begin
            made += _session(rng, user, number, start)
    return sorted(made, key=lambda event: event.at)


def _start(rng: random.Random, begin: datetime) -> datetime:
    if rng.random() < 0.3:  # within three hours of a change
        return rng.choice(CHANGES) + timedelta(minutes=rng.randrange(-180, 180))
    day = begin + timedelta(days=rng.expovariate(1 / 12))
    if rng.random() < 0.3:  # within some minutes of a local midnight
        local = day.astimezone(ZoneInfo(rng.choice(ZONES))).replace(hour=0, minute=0, second=0, microsecond=0)
        return local.astimezone(UTC) + timedelta(seconds=rng.randrange(-600, 600))
    return day


def _session(rng: random.Random, user: int, number: int, at: datetime) -> list[Event]:
    session = identifier(3, user * 1000 + number) if rng.random() < 0.9 else None
    made = []
    for position in range(rng.randrange(1, 9)):
        kind = "user_registered" if not number and not position else rng.choice(TYPES[1:])
        memory = {"memory_id": f"m{rng.randrange(5)}", "source": rng.choice(("feed", "search"))}
        if kind == "memory_viewed":
            memory["duration_ms"] = rng.choice((1200, 90.5, "long"))  # type: ignore[assignment]
        made.append(Event(kind, at, identifier(1, user), identifier(2, user // 3), session, memory))
        # Some at the same moment, some after the gap that ends a session.
        at += timedelta(seconds=rng.choice((0, 1, 20, 300, 1799, 1800, 1801, 5400)))
    return made


def metrics(seed: int, number: int = 6000) -> list[Metric]:
    """Return requests, each with its count and its duration, and some counts of several requests."""
    rng = random.Random(seed)
    made: list[Metric] = []
    for _ in range(number):
        at = (
            FIRST
            + timedelta(days=50)
            + timedelta(seconds=rng.randrange(20 * 86400), microseconds=rng.randrange(10**6))
        )
        endpoint, method = rng.choice(ENDPOINTS)
        labels = {
            "endpoint": endpoint,
            "method": method,
            "status": rng.choice(("200", "200", "404", "500", "503")),
        }
        made.append(Metric("api_request_count", at, rng.choice((1, 1, 1, 3)), labels))
        if rng.random() < 0.9:
            made.append(Metric("api_request_duration_ms", at, round(rng.lognormvariate(3, 1.2), 3), labels))
    return made


def insert(connection: Connection, rows: Iterable[Event | Metric], *, mark: bool = True) -> None:
    """Insert rows and mark their hours like a load, or without marks like other programs. Does not commit."""
    rows = list(rows)
    found = [row for row in rows if isinstance(row, Event)]
    measured = [row for row in rows if isinstance(row, Metric)]
    _copy(
        connection,
        "analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata, "
        "created_at)",
        [
            (UUID(int=random.getrandbits(128)), row.event_type, row.at, row.user, row.family, row.session,
             json.dumps(row.metadata), row.created) for row in found
        ],
    )  # fmt: skip
    _copy(
        connection,
        "analytics_metrics (metric_name, metric_type, value, labels, timestamp)",
        [(row.name, "counter", row.value, json.dumps(row.labels), row.at) for row in measured],
    )
    if mark:
        hours = {("events", hour(row.at)) for row in found} | {("metrics", hour(row.at)) for row in measured}
        _copy(connection, "analytics_touched (source, hour)", sorted(hours))


def refresh(connection: Connection, at_most: int = 100_000) -> int:
    """Refresh in separate transactions until nothing is left; return the number of hours and days."""
    total = 0
    while True:
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            ((done,),) = connection.execute("SELECT analytics_refresh(%s)", [at_most]).fetchall()
        if not done:
            return total
        total += done


def _copy(connection: Connection, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    with connection.cursor().copy(f"COPY {into} FROM STDIN".encode()) as copy:
        for row in rows:
            copy.write_row(row)


def hour(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)
