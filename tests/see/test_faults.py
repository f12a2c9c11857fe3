"""One test for each kind of fault that users of PostHog and Umami reported."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from loader.load.database import Connection
from tests.load.lines import rows
from tests.see import data, independent
from tests.see.data import Event, identifier, insert, refresh

ZONES_WITH_CHANGES = {
    "America/New_York": datetime(2025, 11, 2, 6, tzinfo=UTC),
    "Europe/Berlin": datetime(2025, 10, 26, 1, tzinfo=UTC),
    "Australia/Lord_Howe": datetime(2025, 10, 4, 15, 30, tzinfo=UTC),  # by half an hour
    "America/Havana": datetime(2025, 11, 2, 5, tzinfo=UTC),  # back to midnight, which occurs twice
    "Africa/Cairo": datetime(2025, 4, 24, 22, tzinfo=UTC),  # from midnight to one: there is none
    "Asia/Beirut": datetime(2025, 10, 25, 21, tzinfo=UTC),  # from midnight back to eleven
}


def people(number: int, at: datetime, kind: str = "x") -> Event:
    return Event(kind, at, identifier(1, number), identifier(2, number))


@pytest.mark.parametrize("tz", ZONES_WITH_CHANGES)
@pytest.mark.parametrize("rolled", [False, True])
def test_no_day_appears_twice_or_is_missing_when_clocks_change(
    one_connection: Connection, tz: str, *, rolled: bool
) -> None:
    """PostHog 31775 and 32075: an event every ten minutes; each belongs to its local day."""
    change = ZONES_WITH_CHANGES[tz]
    moments = [change + timedelta(minutes=10 * n) for n in range(-6 * 72, 6 * 72)]
    insert(one_connection, [people(n % 7, at) for n, at in enumerate(moments)])
    one_connection.commit()
    if rolled:
        refresh(one_connection)
    since, until = moments[0], moments[-1] + timedelta(microseconds=1)
    expected = Counter(at.astimezone(ZoneInfo(tz)).date() for at in moments)
    found = one_connection.execute(
        "SELECT starts, events FROM analytics_trend(%s, %s, 'day', %s)", [since, until, tz]
    ).fetchall()
    assert [events for _, events in found] == [expected[day] for day in sorted(expected)]
    starts = [start for start, _ in found]
    assert starts == [independent.midnight(day, tz) for day in sorted(expected)]
    assert len(set(starts)) == len(starts)
    active = one_connection.execute(
        "SELECT day FROM analytics_active(%s, %s, %s)", [since, until, tz]
    ).fetchall()
    assert [day for (day,) in active] == sorted(expected)
    hours = one_connection.execute(
        "SELECT starts, events FROM analytics_trend(%s, %s, 'hour', %s)", [since, until, tz]
    ).fetchall()
    assert sum(events for _, events in hours) == len(moments)
    assert len({start for start, _ in hours}) == len(hours)


@pytest.mark.parametrize("session_tz", ["UTC", "America/New_York"])
def test_a_window_across_a_change_of_the_clock_is_not_an_hour_off(
    one_connection: Connection, session_tz: str
) -> None:
    """PostHog 21042: a day is 24 hours, also for a reader whose zone changes its clock within it."""
    entry = datetime(2025, 11, 2, 0, 30, tzinfo=UTC)
    seconds = {1: 24 * 3600, 2: 24 * 3600 + 1, 3: 24 * 3600 - 1}
    for user, after in seconds.items():
        insert(
            one_connection, [people(user, entry, "a"), people(user, entry + timedelta(seconds=after), "b")]
        )
    one_connection.execute(f"SET TimeZone = '{session_tz}'".encode())
    found = one_connection.execute(
        "SELECT reached FROM analytics_funnel(ARRAY['a', 'b'], %s, %s, '1 day')",
        [entry, entry + timedelta(hours=1)],
    ).fetchall()
    assert found == [(3,), (2,)]
    for days, inside in ((28, 1), (7, 1), (1, 1)):
        as_of = entry + timedelta(days=days)
        column = f"a_{days}d"
        ((events,),) = one_connection.execute(
            f"SELECT events_{days}d FROM analytics_features(%s) WHERE user_id = %s".encode(),
            [as_of, identifier(1, 1)],
        ).fetchall()
        assert events - (days > 1) == inside, column  # the second event is a day later


@pytest.mark.parametrize("tz", ["Pacific/Auckland", "America/Los_Angeles", "Asia/Kolkata"])
def test_weekly_and_monthly_users_are_right_outside_utc(one_connection: Connection, tz: str) -> None:
    """PostHog 14034: one user at each local midnight and a minute before it."""
    zone = ZoneInfo(tz)
    events = []
    for day in range(40):
        midnight = datetime(2025, 10, 1, tzinfo=zone) + timedelta(days=day)
        events += [
            people(day, midnight.astimezone(UTC)),
            people(100 + day, (midnight - timedelta(minutes=1)).astimezone(UTC)),
        ]
    insert(one_connection, events)
    since, until = datetime(2025, 10, 28, tzinfo=zone), datetime(2025, 11, 7, tzinfo=zone)
    found = one_connection.execute(
        "SELECT * FROM analytics_active(%s, %s, %s)", [since, until, tz]
    ).fetchall()
    assert [row[1:4] for row in found] == [(2, 14, 56)] * 10
    assert [row[:4] for row in found] == independent.active(events, since, until, tz, "user", None)


def test_retention_and_trends_agree_on_the_day(one_connection: Connection) -> None:
    """PostHog 17415: the size of a day's cohort is the number of registrations in this day's trend."""
    events = data.events(3)
    insert(one_connection, events)
    for tz in (*data.ZONES, "Asia/Kathmandu"):
        values = [data.FIRST, data.LAST, "day", tz]
        trend = one_connection.execute(
            "SELECT (starts AT TIME ZONE %s)::date, events FROM analytics_trend(%s, %s, %s, %s, "
            "ARRAY['user_registered']) WHERE events > 0", [tz, *values]
        ).fetchall()  # fmt: skip
        cohorts = one_connection.execute(
            "SELECT cohort, size FROM analytics_retention(%s, %s, %s, %s, 3, ARRAY['user_registered']) "
            "WHERE period = 0",
            values,
        ).fetchall()
        assert trend == cohorts


def test_the_time_to_convert_is_never_longer_than_the_window(one_connection: Connection) -> None:
    """PostHog 5677."""
    insert(one_connection, data.events(4))
    for within in ("1 second", "5 minutes", "30 minutes", "1 day"):
        for strict in (False, True):
            found = one_connection.execute(
                "SELECT p50, p90 FROM analytics_funnel(ARRAY['feed_viewed', 'memory_viewed', "
                "'reaction_created'], %s, %s, "
                "%s::interval, %s)", [data.FIRST, data.LAST, within, strict]
            ).fetchall()  # fmt: skip
            ((window,),) = one_connection.execute("SELECT %s::interval", [within]).fetchall()
            assert all(value is None or value <= window for row in found for value in row)


def test_steps_after_the_end_of_the_range_count(one_connection: Connection) -> None:
    """PostHog 44204: a window that ends with the range understates late entries."""
    at = datetime(2025, 10, 1, 12, tzinfo=UTC)
    insert(one_connection, [people(1, at, "a"), people(1, at + timedelta(hours=5), "b")])
    found = one_connection.execute(
        "SELECT reached FROM analytics_funnel(ARRAY['a', 'b'], %s, %s, '6 hours')",
        [at, at + timedelta(seconds=1)],
    ).fetchall()
    assert found == [(1,), (1,)]


def test_of_many_event_types_the_frequent_ones_are_shown(one_connection: Connection) -> None:
    """Umami 2581: 200 types."""
    at = datetime(2025, 10, 1, 12, tzinfo=UTC)
    insert(one_connection, [people(k, at, f"type_{n:03}") for n in range(200) for k in range(n % 50 + 1)])
    question = (
        "SELECT event_type, sum(events), sum(users) "
        "FROM analytics_trend('2025-10-01', '2025-10-03', top => 5, people => true) GROUP BY 1"
    )
    found = {kind: (events, users) for kind, events, users in rows(one_connection, question)}
    assert len(found) == 6
    assert found.pop("(others)") == (200 / 50 * sum(range(1, 51)) - 50 * 4 - 49, 49)
    assert set(found) == {"type_049", "type_099", "type_149", "type_199", "type_048"}


def test_a_running_total_follows_from_the_trend(one_connection: Connection) -> None:
    """Umami 1857: a counter that runs on, of one statement over the function."""
    insert(one_connection, data.events(3))
    totals = rows(
        one_connection,
        "SELECT sum(sum(events)) OVER (ORDER BY starts) FROM analytics_trend('2025-09-01', '2026-02-01') "
        "GROUP BY starts",
    )
    assert all(a <= b for (a,), (b,) in pairwise(totals))
    assert totals[-1] == rows(one_connection, "SELECT count(*) FROM analytics_events")[0]


def test_a_question_reads_no_rows_outside_its_range(one_connection: Connection) -> None:
    """Umami 1253 and 4526, and our own views: a range must reach the index, whatever the statistics are."""
    insert(one_connection, data.events(3))
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) SELECT "
        "gen_random_uuid(), 'y', "
        "timestamptz '2024-01-01' + n * interval '1 minute', gen_random_uuid(), gen_random_uuid() FROM "
        "generate_series(1, 40000) n"
    )
    one_connection.execute("SELECT analytics_mark('events', '2024-01-01', '2024-06-01')")
    one_connection.commit()
    refresh(one_connection)
    one_connection.autocommit = True
    one_connection.execute("VACUUM ANALYZE analytics_events")
    questions = (
        "trend('2025-10-01', '2025-10-08')", "trend('2025-10-01', '2025-10-01 03:00', 'minute')",
        "sessions('2025-10-01', '2025-10-08')",
        "sessions_by_gap('2025-10-01', '2025-10-08')", "features('2025-10-08')",
        "interactions('2025-10-01', '2025-10-08')",
        "active('2025-10-01', '2025-10-08', types => ARRAY['memory_viewed'])",
    )  # fmt: skip
    for question in questions:
        plan = "\n".join(
            line for (line,) in rows(one_connection, f"EXPLAIN SELECT * FROM analytics_{question}")
        )
        assert "Seq Scan on analytics_events" not in plan, (question, plan)
        assert "analytics_events" in plan


@pytest.mark.parametrize("session_tz", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_two_readers_in_two_zones_get_one_answer(one_connection: Connection, session_tz: str) -> None:
    """The defect of the two old views: their day is that of the reader's session."""
    insert(one_connection, data.events(3, users=10))
    one_connection.execute(f"SET TimeZone = '{session_tz}'".encode())
    found = one_connection.execute(
        "SELECT starts, sum(events) FROM analytics_trend(%s, %s, 'day', 'Europe/Berlin') GROUP BY 1",
        [data.FIRST, data.LAST],
    ).fetchall()
    events = independent.within(data.events(3, users=10), data.FIRST, data.LAST)
    expected = Counter(
        independent.midnight(independent.bucket("day", e.at, "Europe/Berlin"), "Europe/Berlin")
        for e in events
    )
    assert {start: count for start, count in found if count} == expected
