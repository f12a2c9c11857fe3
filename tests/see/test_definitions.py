"""Every question against the same definition in Python, across a change of the clock in three time zones."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.see import independent
from tests.see.conftest import Facts
from tests.see.data import ZONES

SINCE = datetime(2025, 9, 24, 10, 20, tzinfo=UTC)
"""In the middle of a day, an hour and a quarter of an hour everywhere."""
UNTIL = datetime(2025, 11, 12, 4, 7, 30, tzinfo=UTC)


def ask(facts: Facts, question: str, *values: Any) -> list[tuple[Any, ...]]:
    with facts.connection.transaction():
        facts.connection.execute("SET LOCAL TimeZone = 'Pacific/Auckland'")  # must not matter
        facts.connection.execute("SET LOCAL jit = off")  # as for the reader's role
        rows = facts.connection.execute(f"SELECT * FROM analytics_{question}".encode(), values).fetchall()
    return [tuple(v.astimezone(UTC) if isinstance(v, datetime) else v for v in row) for row in rows]


@pytest.mark.parametrize("tz", ZONES)
@pytest.mark.parametrize(
    ("bucket", "types"), [("day", None), ("week", ["memory_viewed", "absent"]), ("month", None)]
)
def test_trend(facts: Facts, tz: str, bucket: str, types: list[str] | None) -> None:
    found = ask(facts, "trend(%s, %s, %s, %s, %s, true)", SINCE, UNTIL, bucket, tz, types)
    expected = independent.trend(facts.events, SINCE, UNTIL, bucket, tz, types)
    assert {row[:5] for row in found} == expected
    assert len(found) == len(expected)
    last = independent.midnight(independent.bucket(bucket, UNTIL, tz), tz)
    assert all(complete is (SINCE <= start < last) for start, *_, complete in found)


@pytest.mark.parametrize("tz", ZONES)
def test_trend_by_hour(facts: Facts, tz: str) -> None:
    for change in (
        datetime(2025, 11, 2, tzinfo=UTC),
        datetime(2025, 10, 26, tzinfo=UTC),
        datetime(2025, 10, 4, 12, tzinfo=UTC),
    ):
        until = change + timedelta(hours=9, minutes=31)
        found = ask(facts, "trend(%s, %s, 'hour', %s, NULL, true)", change, until, tz)
        expected = independent.trend(facts.events, change, until, "hour", tz, None)
        assert {row[:5] for row in found} == expected
        assert len(found) == len(expected)


@pytest.mark.parametrize("tz", ZONES)
@pytest.mark.parametrize(("who", "types"), [("user", None), ("family", None), ("user", ["memory_viewed"])])
def test_active(facts: Facts, tz: str, who: str, types: list[str] | None) -> None:
    found = ask(facts, "active(%s, %s, %s, %s, %s)", SINCE, UNTIL, tz, who, types)
    assert [row[:4] for row in found] == independent.active(facts.events, SINCE, UNTIL, tz, who, types)
    assert [row[5] for row in found] == [False, *[True] * (len(found) - 2), False]


@pytest.mark.parametrize("tz", ZONES)
@pytest.mark.parametrize(
    ("bucket", "who", "types"),
    [("day", "user", None), ("week", "family", None), ("month", "user", ["memory_viewed"])],
)
def test_lifecycle(facts: Facts, tz: str, bucket: str, who: str, types: list[str] | None) -> None:
    found = ask(facts, "lifecycle(%s, %s, %s, %s, %s, %s)", SINCE, UNTIL, bucket, tz, who, types)
    assert [row[:5] for row in found] == independent.lifecycle(
        facts.events, SINCE, UNTIL, bucket, tz, who, types
    )
    assert [row[5] for row in found] == [*[True] * (len(found) - 1), False]


@pytest.mark.parametrize("tz", ZONES)
@pytest.mark.parametrize("unbounded", [False, True])
@pytest.mark.parametrize(
    ("bucket", "starting", "coming", "who"),
    [
        ("week", None, None, "user"),
        ("week", ["user_registered"], ["memory_viewed", "comment_created"], "user"),
        ("day", ["user_registered"], None, "family"), ("month", None, ["memory_viewed"], "user"),
    ],
)  # fmt: skip
def test_retention(
    facts: Facts,
    tz: str,
    bucket: str,
    unbounded: bool,
    starting: list[str] | None,
    coming: list[str] | None,
    who: str,
) -> None:
    values = (bucket, tz, 6, starting, coming, unbounded, who)
    found = ask(facts, "retention(%s, %s, %s, %s, %s, %s, %s, %s, %s)", SINCE, UNTIL, *values)
    expected = independent.retention(facts.events, SINCE, UNTIL, *values)
    assert [(*row[:4], row[5]) for row in found] == expected
    assert expected


@pytest.mark.parametrize("who", ["user", "family", "session"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("steps", "window"),
    [
        (["feed_viewed", "memory_viewed", "reaction_created"], timedelta(minutes=30)),
        (["memory_viewed", "comment_created", "memory_viewed", "reaction_created"], timedelta(hours=2)),
        (["feed_viewed", "feed_viewed"], timedelta(days=1)),
        (["user_registered", "comment_created"], timedelta(days=14)),
        (["feed_viewed"], timedelta(0)),
    ],
)  # fmt: skip
def test_funnel(facts: Facts, steps: list[str], window: timedelta, strict: bool, who: str) -> None:
    found = ask(facts, "funnel(%s, %s, %s, %s, %s, %s)", steps, SINCE, UNTIL, window, strict, who)
    expected = independent.funnel(facts.events, steps, SINCE, UNTIL, window, strict, who)
    assert [row[3] for row in found] == [count for count, _ in expected]
    for row, (_, times) in zip(found, expected, strict=True):
        for value, share in ((row[6], 0.5), (row[7], 0.9)):
            wanted = independent.median(times, share)
            if wanted is None:
                assert value is None
            else:
                assert value.total_seconds() == pytest.approx(wanted, abs=1e-5)
                assert value <= window


def test_funnel_by_a_key_of_the_first_entry(facts: Facts) -> None:
    steps, window = ["feed_viewed", "memory_viewed"], timedelta(hours=1)
    found = ask(facts, "funnel(%s, %s, %s, %s, false, 'user', 'source')", steps, SINCE, UNTIL, window)
    first: dict[Any, set[Any]] = {}
    entries = independent.within(facts.events, SINCE, UNTIL, ["feed_viewed"])
    for entry in entries:
        if entry.at == min(each.at for each in entries if each.user == entry.user):
            first.setdefault(entry.user, set()).add(entry.metadata["source"])
    unambiguous = {user for user, sources in first.items() if len(sources) == 1}
    assert sum(row[3] for row in found if row[0] == 1) == len(first)
    for source in ("feed", "search"):
        users = {user for user in unambiguous if first[user] == {source}}
        ((reached,),) = [{row[3] for row in found if row[0] == 1 and row[2] == source}]
        assert len(users) <= reached <= len(users) + len(first) - len(unambiguous)


def test_sessions(facts: Facts) -> None:
    found = ask(facts, "sessions(%s, %s)", SINCE, UNTIL)
    assert {(row[0], row[1], *row[3:]) for row in found} == independent.sessions(facts.events, SINCE, UNTIL)
    for gap in (timedelta(minutes=30), timedelta(minutes=5)):
        found = ask(facts, "sessions_by_gap(%s, %s, %s)", SINCE, UNTIL, gap)
        expected = independent.sessions_by_gap(facts.events, SINCE, UNTIL, gap)
        assert {(row[0], *row[2:]) for row in found} == expected
        assert len(found) == len(expected)


@pytest.mark.parametrize("tz", ZONES)
@pytest.mark.parametrize("bucket", ["hour", "day"])
def test_requests(facts: Facts, tz: str, bucket: str) -> None:
    since, until = datetime(2025, 10, 24, 10, 20, tzinfo=UTC), datetime(2025, 11, 4, tzinfo=UTC)

    def start(at: datetime) -> datetime:
        if bucket == "hour":
            return at.replace(minute=0, second=0, microsecond=0)
        return independent.midnight(independent.bucket(bucket, at, tz), tz)

    _compare(ask(facts, "requests(%s, %s, %s, %s)", since, until, bucket, tz),
             independent.requests(facts.metrics, since, until, start), 0.0101)  # fmt: skip


def test_requests_by_minute_are_exact(facts: Facts) -> None:
    since = datetime(2025, 10, 26, 10, 20, tzinfo=UTC)
    until = since + timedelta(hours=8)
    found = ask(facts, "requests(%s, %s, 'minute')", since, until)
    assert len({row[0] for row in found}) == 8 * 60
    _compare(
        found,
        independent.requests(facts.metrics, since, until, lambda at: at.replace(second=0, microsecond=0)),
        0,
    )


def _compare(found: list[tuple[Any, ...]], expected: dict[Any, Any], tolerance: float) -> None:
    for row in found:
        count, errors, durations = expected.pop(row[:3], (0, 0, []))
        assert (row[3], row[4]) == (count, errors)
        assert row[5] is None if not count else float(row[5]) == pytest.approx(errors / count, abs=1e-5)
        for value, share in zip(row[6:9], (0.5, 0.95, 0.99), strict=True):
            wanted = independent.percentile_disc(durations, share)
            assert value == (None if wanted is None else pytest.approx(wanted, rel=tolerance))
    assert not expected
