"""Features do not leak the future: a training row has only the data available at its moment."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from loader.load.database import Connection
from tests.see import data
from tests.see.data import Event, identifier, insert

AS_OF = datetime(2025, 11, 3, 5, 17, tzinfo=UTC)
TZ = "America/New_York"


def features(
    connection: Connection, known: datetime | None = None, users: list[UUID] | None = None
) -> dict[UUID, Any]:
    cursor = connection.execute("SELECT * FROM analytics_features(%s, %s, %s, %s)", [AS_OF, TZ, known, users])
    names = [column.name for column in cursor.description or ()]
    return {row[0]: dict(zip(names, row, strict=True)) for row in cursor}


def _events(seed: int, number: int, since: datetime, until: datetime, created: datetime) -> list[Event]:
    rng = random.Random(seed)
    span = (until - since).total_seconds()
    made = []
    for position in range(number):
        at, user = since + timedelta(seconds=rng.random() * span), rng.randrange(90)
        people = (identifier(1, user), identifier(2, user // 3), identifier(9, position))
        made.append(Event(rng.choice(data.TYPES), at, *people, {}, created))
    return made


@pytest.fixture
def connection(one_connection: Connection) -> Connection:
    events = [
        Event(e.event_type, e.at, e.user, e.family, e.session, e.metadata, e.at) for e in data.events(8)
    ]
    insert(one_connection, events)
    return one_connection


@pytest.mark.parametrize("known", [None, AS_OF])
def test_events_at_and_after_the_moment_change_nothing(
    connection: Connection, known: datetime | None
) -> None:
    before = features(connection, known)
    assert len(before) > 40
    later = _events(1, 200, AS_OF, AS_OF + timedelta(days=30), AS_OF - timedelta(days=1))
    insert(
        connection,
        [*later, Event("feed_viewed", AS_OF, identifier(1, 0), identifier(2, 77), None, {}, AS_OF)],
    )
    assert features(connection, known) == before


def test_late_events_change_nothing_when_it_is_given_what_was_known(connection: Connection) -> None:
    before, all_before = features(connection, AS_OF), features(connection)
    late = _events(2, 300, AS_OF - timedelta(days=28), AS_OF, AS_OF + timedelta(seconds=1))
    first = Event(
        "feed_viewed",
        datetime(2025, 1, 1, tzinfo=UTC),
        identifier(1, 0),
        identifier(2, 0),
        None,
        {},
        AS_OF + timedelta(1),
    )
    insert(connection, [*late, first])
    assert features(connection, AS_OF) == before
    assert features(connection) != all_before


def test_one_user_alone_equals_the_bulk(connection: Connection) -> None:
    bulk = features(connection)
    for user, row in bulk.items():
        assert features(connection, users=[user]) == {user: row}
    some = list(bulk)[:5]
    assert features(connection, users=some) == {user: bulk[user] for user in some}


def test_each_value_equals_an_independent_one(connection: Connection) -> None:
    events = [e for e in data.events(8) if e.at < AS_OF]
    by_user: dict[UUID, list[Event]] = defaultdict(list)
    for event in events:
        by_user[event.user].append(event)
    found = features(connection)
    assert set(found) == {user for user, own in by_user.items() if own[-1].at >= AS_OF - timedelta(days=28)}
    for user, row in found.items():
        for name, value in _independent(by_user[user]).items():
            assert row[name] == pytest.approx(value, abs=1e-6), name


def _independent(history: list[Event]) -> dict[str, Any]:
    recent = [e for e in history if e.at >= AS_OF - timedelta(days=28)]
    values: dict[str, Any] = {
        "tenure_days": (AS_OF - history[0].at) / timedelta(days=1),
        "recency_hours": (AS_OF - history[-1].at) / timedelta(hours=1),
    }  # fmt: skip
    for days in (1, 7, 28):
        own = [e for e in history if e.at >= AS_OF - timedelta(days=days)]
        values[f"events_{days}d"] = len(own)
        values[f"active_days_{days}d"] = len({e.at.astimezone(ZoneInfo(TZ)).date() for e in own})
        for kind in data.TYPES:
            values[f"{kind}_{days}d"] = sum(e.event_type == kind for e in own)
    shares = [n / len(recent) for n in Counter(e.event_type for e in recent).values()]
    sessions = _sessions(recent)
    starts = [min(s).astimezone(ZoneInfo(TZ)) for s in sessions]
    angles = [
        (s.hour * 3600 + s.minute * 60 + s.second + s.microsecond / 1e6) / 86400 * 2 * math.pi for s in starts
    ]
    x, y = (sum(f(a) for a in angles) / len(angles) for f in (math.cos, math.sin))
    return values | {
        "types_28d": len(shares), "type_entropy_28d": -sum(s * math.log(s) for s in shares),
        "sessions_28d": len(sessions),
        "session_events_mean": len(recent) / len(sessions),
        "session_minutes_mean": sum((max(s) - min(s)).total_seconds() / 60 for s in sessions) / len(sessions),
        "hour_mean": math.atan2(y, x) % (2 * math.pi) / (2 * math.pi) * 24,
        "hour_concentration": math.hypot(x, y),
        "weekend_share": sum(s.isoweekday() > 5 for s in starts) / len(starts),
    }  # fmt: skip


def _sessions(events: list[Event]) -> list[list[datetime]]:
    """Return sessions by session_id, and by gaps of 30 minutes for events without one."""
    known: dict[UUID | None, list[datetime]] = defaultdict(list)
    for event in events:
        known[event.session].append(event.at)
    gaps: list[list[datetime]] = []
    for at in known.pop(None, []):
        if gaps and at - gaps[-1][-1] <= timedelta(minutes=30):
            gaps[-1].append(at)
        else:
            gaps.append([at])
    return [*known.values(), *gaps]


TRAINING_SET = """
-- For a churn model: what was known of each user on five Mondays, and whether they came back within 28 days.
SELECT moment AS as_of, f.*, NOT EXISTS (
    SELECT FROM analytics_events e
    WHERE e.user_id = f.user_id AND e.timestamp >= moment AND e.timestamp < moment + interval '672 hours'
) AS churned
FROM generate_series(timestamptz '2025-09-22 00:00+00', '2025-10-20 00:00+00', interval '168 hours') AS moment
    CROSS JOIN LATERAL analytics_features(moment, 'UTC', known => moment) AS f
"""


def test_the_training_set_for_a_churn_model_does_not_leak(connection: Connection) -> None:
    cursor = connection.execute(TRAINING_SET.encode())
    names = [column.name for column in cursor.description or ()]
    before = {(row[0], row[1]): row for row in cursor}
    assert {row[-1] for row in before.values()} == {False, True}
    assert len(names) == 18 + 51 + 2
    # Later events, or later arrivals, change no feature of the first moment; only the label may change.
    first = min(moment for moment, _ in before)
    happened = _events(3, 300, first, datetime(2025, 11, 20, tzinfo=UTC), first)
    arrived = _events(4, 300, first - timedelta(days=28), first, first + timedelta(seconds=1))
    insert(connection, [*happened, *arrived])
    after = {(row[0], row[1]): row for row in connection.execute(TRAINING_SET.encode())}
    for key, row in before.items():
        if key[0] == first:
            assert after[key][:-1] == row[:-1]
    assert {key for key in after if key[0] == first} == {key for key in before if key[0] == first}
    assert after != before


def test_interactions(one_connection: Connection) -> None:
    events = data.events(9)
    insert(one_connection, events)
    since, until, half_life = data.FIRST, datetime(2025, 11, 1, tzinfo=UTC), timedelta(days=10)
    found = one_connection.execute(
        "SELECT * FROM analytics_interactions(%s, %s, %s)", [since, until, half_life]
    ).fetchall()
    weights = {"memory_viewed": 1, "reaction_created": 3, "comment_created": 5}
    expected: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if since <= event.at < until and event.event_type in weights:
            expected[event.user, event.metadata["memory_id"]].append(event)
    assert len(found) == len(expected)
    for user, memory, views, reactions, comments, seconds, weight, last in found:
        own = expected[user, memory]
        counts = Counter(e.event_type for e in own)
        assert (views, reactions, comments) == tuple(counts[kind] for kind in weights)
        durations = [e.metadata.get("duration_ms") for e in own]
        assert seconds == pytest.approx(sum(d for d in durations if isinstance(d, int | float)) / 1000)
        assert weight == pytest.approx(
            sum(weights[e.event_type] * 0.5 ** ((until - e.at) / half_life) for e in own)
        )
        assert last == max(e.at for e in own)


def test_odd_values_stop_no_interactions(one_connection: Connection) -> None:
    """Durations that are not numbers or exceed a float, and events a thousand half-lives ago."""
    at = datetime(2025, 9, 1, tzinfo=UTC)
    durations: tuple[Any, ...] = ("long", None, [1], {}, True, 10**400)
    for duration in durations:
        metadata = {"memory_id": "m", "duration_ms": duration}
        insert(
            one_connection, [Event("memory_viewed", at, identifier(1, 1), identifier(2, 1), None, metadata)]
        )
    found = one_connection.execute(
        "SELECT views, seconds FROM analytics_interactions(%s, %s, '1 minute')", [at, data.LAST]
    )
    assert found.fetchall() == [(6, 0)]
