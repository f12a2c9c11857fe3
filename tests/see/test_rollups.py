"""Rollups are exact in every snapshot, in whatever order loads, refreshes and prunings commit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest

from loader.load import rollups
from loader.load.database import Connection
from loader.service.upkeep import refresher
from tests.load.lines import event, metric, number, rows, segment
from tests.processes import Cli, eventually
from tests.see import data, independent
from tests.see.data import Event, Metric, identifier, insert, refresh

ODD_ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Asia/Kathmandu", "Pacific/Chatham",
    "Australia/Lord_Howe"
)  # fmt: skip


class History:
    """Three loaders, a refresher and a pruner on one database, and a copy of every row that was committed."""

    def __init__(self, connection: Connection, seed: int) -> None:
        self.rng = random.Random(seed)
        self.owner = connection
        self.loaders = [self._connect() for _ in range(3)]
        self.pending: list[list[Event | Metric]] = [[], [], []]
        self.refresher = self._connect()
        self.refreshing = False
        self.now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        self.committed: list[Event | Metric] = []
        self.happened: dict[str, int] = {}

    def step(self) -> bool:
        """Do something; return whether a transaction ended."""
        actor = self.rng.choice(("load", "load", "load", "refresh", "prune"))
        return {"load": self._load, "refresh": self._refresh, "prune": self._prune}[actor]()

    def end(self) -> None:
        for each in range(3):
            if self.pending[each]:
                self._finish(each)
        if self.refreshing:
            self.refresher.rollback()
            self.refreshing = False

    def _connect(self) -> Connection:
        connection = psycopg.connect(self.owner.info.dsn)
        connection.execute("SET lock_timeout = '20ms'")
        connection.commit()
        return connection

    def _load(self) -> bool:
        each = self.rng.randrange(3)
        if self.pending[each]:
            self._finish(each)
            return True
        made = [self._row() for _ in range(self.rng.randrange(1, 7))]
        insert(self.loaders[each], made)
        self.pending[each] = made
        return False

    def _finish(self, loader: int) -> None:
        made, self.pending[loader] = self.pending[loader], []
        if self.rng.random() < 0.8:
            self.loaders[loader].commit()
            self.committed += made
            self._count("commit")
        else:
            self.loaders[loader].rollback()
            self._count("rollback")

    def _row(self) -> Event | Metric:
        """Of one of the last 60 hours, often the one that has not ended; sometimes of one that is pruned."""
        hours = self.rng.choice((0, 1, self.rng.randrange(60)))
        at = self.now - timedelta(hours=hours) + timedelta(seconds=self.rng.randrange(3600))
        if self.rng.random() < 0.4:
            labels = {
                "endpoint": self.rng.choice("ab"),
                "method": "GET",
                "status": self.rng.choice(("200", "500")),
            }
            return Metric("api_request_count", at, self.rng.randrange(1, 4), labels)
        user = self.rng.randrange(12)
        return Event(self.rng.choice("xyz"), at, identifier(1, user), identifier(2, user // 3))

    def _refresh(self) -> bool:
        if self.refreshing:
            self.refreshing = False
            end = self.rng.choice(("commit", "commit", "commit", "rollback", "kill"))
            if end == "kill":
                self.owner.execute("SELECT pg_terminate_backend(%s)", [self.refresher.info.backend_pid])
                self.owner.commit()
                self.refresher.close()
                self.refresher = self._connect()
            else:
                getattr(self.refresher, end)()
            self._count(f"refresh: {end}")
            return True
        try:
            self.refresher.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            self.refresher.execute("SELECT analytics_refresh(%s)", [self.rng.choice((1, 5, 1000))])
        except psycopg.errors.SerializationFailure:
            self.refresher.rollback()
            self._count("refresh: conflict")
        else:
            self.refreshing = True
        return False

    def _prune(self) -> bool:
        source = self.rng.choice(("events", "metrics"))
        before = self.now - timedelta(hours=30)
        try:
            with self.owner.transaction():
                self.owner.execute("SET LOCAL lock_timeout = '20ms'")
                found = self.owner.execute(
                    "SELECT * FROM analytics_prunable(%s, %s)", [source, before]
                ).fetchall()
                if not found:
                    return False
                hour, at_most = self.rng.choice(found)[0], self.rng.choice((1, 3, 5000))
                self.owner.execute("SELECT analytics_prune_hour(%s, %s, %s)", [source, hour, at_most])
        except psycopg.errors.LockNotAvailable:
            return False
        self._count(f"prune {source}")
        return True

    def _count(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    # ---- what a reader must get --------------------------------------------------------------------

    def check(self, tz: str) -> None:
        since, until = self.now - timedelta(hours=72), self.now + timedelta(hours=1)
        events = [row for row in self.committed if isinstance(row, Event)]
        with self.owner.transaction():
            trend = self.owner.execute(
                "SELECT starts, event_type, events FROM analytics_trend(%s, %s, 'hour') WHERE events > 0",
                [since, until],
            ).fetchall()
            active = self.owner.execute(
                "SELECT * FROM analytics_active(%s, %s, %s)", [since, until, tz]
            ).fetchall()
            requests = self.owner.execute(
                "SELECT starts, endpoint, requests, errors FROM analytics_requests(%s, %s) WHERE requests "
                "> 0",
                [since, until],
            ).fetchall()
        assert {(at.astimezone(UTC), *rest) for at, *rest in trend} == {
            row[:3] for row in independent.trend(events, since, until, "hour", "UTC", None) if row[2]
        }
        assert [row[:4] for row in active] == independent.active(events, since, until, tz, "user", None)
        assert {(at.astimezone(UTC), *rest) for at, *rest in requests} == self._requests()

    def _requests(self) -> set[Any]:
        found: dict[Any, list[float]] = {}
        for row in self.committed:
            if isinstance(row, Metric):
                both = found.setdefault((data.hour(row.at), row.labels["endpoint"]), [0, 0])
                both[0] += row.value
                both[1] += row.value if row.labels["status"] == "500" else 0
        return {(*key, *both) for key, both in found.items()}


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 12))])
def test_random_histories_equal_brute_force(one_connection: Connection, seed: int) -> None:
    history = History(one_connection, seed)
    for step in range(400):
        if history.step():
            history.check(ODD_ZONES[step % len(ODD_ZONES)])
    history.end()
    for tz in ODD_ZONES:
        history.check(tz)
    refresh(one_connection)
    for tz in ODD_ZONES:
        history.check(tz)
    wanted = {
        "commit",
        "rollback",
        "refresh: commit",
        "refresh: rollback",
        "refresh: kill",
        "prune events",
        "prune metrics",
    }
    assert wanted <= history.happened.keys(), history.happened


def test_a_load_that_commits_after_a_refresh_is_not_lost(one_connection: Connection) -> None:
    """The interleaving in which a mark with a key is lost."""
    at = datetime(2025, 9, 1, 12, 30, tzinfo=UTC)
    row = Event("x", at, identifier(1, 1), identifier(2, 1))
    insert(one_connection, [row])
    one_connection.commit()
    with psycopg.connect(one_connection.info.dsn) as late:
        insert(late, [row])
        refresh(one_connection)
        late.commit()
    question = "SELECT sum(events) FROM analytics_trend(%s, %s)"
    assert one_connection.execute(question, [at - timedelta(days=1), at + timedelta(days=1)]).fetchone() == (
        2,
    )


@pytest.fixture
def pruned(one_connection: Connection) -> Iterator[tuple[Connection, list[Event]]]:
    """All rows before 15 October are gone."""
    events, metrics = data.events(5), data.metrics(5)
    insert(one_connection, [*events, *metrics])
    one_connection.commit()
    refresh(one_connection)
    prune(one_connection, datetime(2025, 10, 15, tzinfo=UTC))
    yield one_connection, events


def prune(connection: Connection, before: datetime) -> None:
    for source in ("events", "metrics"):
        for (hour,) in connection.execute(
            "SELECT * FROM analytics_prunable(%s, %s)", [source, before]
        ).fetchall():
            connection.execute("SELECT analytics_prune_hour(%s, %s)", [source, hour])
            connection.commit()


def test_nobody_is_new_again_after_pruning(pruned: tuple[Connection, list[Event]]) -> None:
    connection, events = pruned
    ((oldest,),) = connection.execute("SELECT min(timestamp) FROM analytics_events").fetchall()
    assert oldest >= datetime(2025, 10, 15, tzinfo=UTC)
    for tz in ODD_ZONES:
        _compare_users(connection, events, tz)


def _compare_users(connection: Connection, events: list[Event], tz: str) -> None:
    since, until = datetime(2025, 9, 1, tzinfo=UTC), datetime(2025, 11, 12, 4, 7, tzinfo=UTC)
    for bucket in ("day", "week"):
        found = connection.execute(
            "SELECT * FROM analytics_lifecycle(%s, %s, %s, %s)", [since, until, bucket, tz]
        ).fetchall()
        assert [row[:5] for row in found] == independent.lifecycle(
            events, since, until, bucket, tz, "user", None
        )
    found = connection.execute(
        "SELECT * FROM analytics_active(%s, %s, %s, 'family')", [since, until, tz]
    ).fetchall()
    assert [row[:4] for row in found] == independent.active(events, since, until, tz, "family", None)
    found = connection.execute(
        "SELECT * FROM analytics_retention(%s, %s, 'week', %s)", [since, until, tz]
    ).fetchall()
    expected = independent.retention(events, since, until, "week", tz, 8, None, None, False, "user")
    assert [(*row[:4], row[5]) for row in found] == expected


def test_a_rebuild_finds_what_others_changed_and_keeps_what_is_pruned(
    pruned: tuple[Connection, list[Event]],
) -> None:
    connection, events = pruned
    since, until = datetime(2025, 9, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
    trend = "SELECT sum(events) FROM analytics_trend(%s, %s)"
    others = [
        Event("x", datetime(2025, 11, 1, 12, n, tzinfo=UTC), identifier(1, n), identifier(2, 1))
        for n in range(9)
    ]
    insert(connection, others, mark=False)
    connection.commit()
    assert connection.execute(trend, [since, until]).fetchone() == (len(events),)
    check = "SELECT source, hour, in_rows - in_rollup FROM analytics_check_rollups(%s, %s)"
    assert connection.execute(check, [since, until]).fetchall() == [
        ("events", datetime(2025, 11, 1, 12, tzinfo=UTC), 9)
    ]
    connection.commit()
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT analytics_rebuild()")
    for _ in range(2):  # while the hours are touched, and once they are computed
        assert connection.execute(trend, [since, until]).fetchone() == (len(events) + 9,)
        found = connection.execute("SELECT * FROM analytics_active(%s, %s)", [since, until]).fetchall()
        assert [row[:4] for row in found] == independent.active(
            [*events, *others], since, until, "UTC", "user", None
        )
        connection.commit()
        refresh(connection)
    assert connection.execute(check, [since, until]).fetchall() == []


def test_others_may_mark_what_they_change(one_connection: Connection) -> None:
    at = datetime(2025, 9, 1, 12, 30, tzinfo=UTC)
    insert(one_connection, [Event("x", at, identifier(1, 1), identifier(2, 1))] * 3)
    one_connection.commit()
    refresh(one_connection)
    one_connection.execute(
        "DELETE FROM analytics_events WHERE event_id = (SELECT min(event_id::text)::uuid FROM "
        "analytics_events)"
    )
    one_connection.execute("SELECT analytics_mark('events', %s, %s)", [at, at + timedelta(seconds=1)])
    one_connection.commit()
    question = "SELECT sum(events) FROM analytics_trend('2025-08-30', '2025-09-03')"
    assert one_connection.execute(question).fetchone() == (2,)
    one_connection.commit()
    refresh(one_connection)
    assert one_connection.execute(question).fetchone() == (2,)


def test_no_value_stops_a_refresh(one_connection: Connection) -> None:
    """Values that no float holds, labels longer than an index entry, hours of the years 1 and 9999."""
    at = datetime(2025, 9, 1, 12, tzinfo=UTC)
    one_connection.execute(
        "INSERT INTO analytics_metrics (metric_name, metric_type, value, labels, timestamp) "
        "SELECT 'odd', 'gauge', v::numeric, jsonb_build_object('k', repeat(md5(v), 500)), %s "
        "FROM unnest(ARRAY['1e400', '-1e400', '1e-400', '0', 'NaN', '-5', '0.1']) v "
        "UNION ALL SELECT 'odd', 'gauge', 1, NULL, %s",
        [at, at],
    )
    people = (identifier(1, 1), identifier(2, 1))
    moments = [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, tzinfo=UTC), at]
    insert(one_connection, [Event("x", moment, *people) for moment in moments])
    one_connection.execute("SELECT analytics_mark('metrics', %s, %s)", [at, at + timedelta(seconds=1)])
    one_connection.commit()
    assert refresh(one_connection) == 5  # three hours and two days
    assert one_connection.execute("SELECT count(*) FROM analytics_hourly_metrics").fetchone() == (8,)
    found = one_connection.execute("SELECT day FROM analytics_user_days ORDER BY 1").fetchall()
    assert found == [(date(1, 1, 1),), (at.date(),)]
    new = one_connection.execute(
        "SELECT sum(new) FROM analytics_lifecycle('2025-08-25', '2025-09-08')"
    ).fetchone()
    assert new == (0,)  # the year 1 was first


@pytest.mark.parametrize("source", ["events", "metrics"])
def test_hours_in_a_row_are_read_by_one_scan(one_connection: Connection, source: str) -> None:
    """A scan for each took 10 s for a month of a freshly loaded table, whose statistics are not known yet."""
    refresh(one_connection)
    start = datetime(2026, 3, 1, 0, 30, tzinfo=UTC)
    hours = [start + timedelta(hours=hour, minutes=-30) for hour in (0, 1, 2, *range(24, 24 * 7))]
    one_connection.cursor().executemany(
        "INSERT INTO analytics_touched VALUES (%s, %s)", [(hour, source) for hour in hours]
    )
    spans = one_connection.execute(
        "SELECT lo, hi FROM analytics_row_spans(%s, %s, %s, 'hour', 'UTC') ORDER BY lo",
        [source, start, start + timedelta(days=9)],
    ).fetchall()
    at = [start.replace(minute=0) + timedelta(hours=hour) for hour in (3, 24, 24 * 7, 24 * 9)]
    assert spans == [(start, at[0]), (at[1], at[2]), (at[3], start + timedelta(days=9))]


def test_a_refresh_needs_one_snapshot(one_connection: Connection) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="analytics_refresh needs one snapshot"):
        one_connection.execute("SELECT analytics_refresh()")


def test_an_hour_whose_rollup_is_not_computed_is_not_pruned(one_connection: Connection) -> None:
    one_connection.execute("INSERT INTO analytics_touched VALUES ('-infinity', 'events')")
    with pytest.raises(psycopg.errors.RaiseException, match="the rollups of events are not computed yet"):
        one_connection.execute("SELECT analytics_prune_hour('events', '2025-09-01 12:00+00')")


def test_the_daemon_refreshes_what_its_loads_touched(
    cli: Cli, one_connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(cli.spool, 1, *[event(n) for n in range(10)], metric(1))
    cli("run", "--once")
    assert (
        rollups.touched(one_connection).hours == 2
    )  # the event's, and the metric's, which is in another zone
    one_connection.rollback()
    monkeypatch.setattr("loader.service.upkeep.IDLE_SECONDS", 0.0)
    upkeep = refresher(lambda: cli.dsn)
    upkeep.tick(busy=True)  # not due
    assert rollups.touched(one_connection).hours == 2
    one_connection.rollback()
    upkeep.tick(busy=False)
    eventually(lambda: number(one_connection, "SELECT count(*) FROM analytics_touched") == 0)
    upkeep.close()
    assert rows(one_connection, "SELECT event_type, events FROM analytics_hourly_events") == [
        ("memory_posted", 10)
    ]
    assert rows(one_connection, "SELECT metric_name, records FROM analytics_hourly_metrics") == [("hits", 1)]
    assert rollups.touched(one_connection) == rollups.Touched(0, None, False, None)
    one_connection.rollback()
    assert rollups.rebuild(one_connection) == 3


def test_lines_that_are_retried_and_duplicates_mark_what_they_add(
    cli: Cli, one_connection: Connection
) -> None:
    segment(cli.spool, 1, event(1), event(2, timestamp="2026-01-20T17:00:00+05:30"), event(3, user_id="bad"))
    cli("run", "--once", code=3)
    hours = "SELECT count(*), count(DISTINCT hour) FROM analytics_touched"
    assert rows(one_connection, hours) == [(2, 2)]
    segment(cli.spool, 2, event(1), event(2, timestamp="2026-01-20T17:00:00+05:30"))
    assert "duplicates 2" in cli("run", "--once")
    assert rows(one_connection, hours) == [(2, 2)]


def test_a_file_that_is_loaded_again_marks_what_it_adds(cli: Cli, one_connection: Connection) -> None:
    path = segment(cli.spool, 1, event(1), event(2))
    kept = path.rename(cli.spool.parent / "kept.ndjson")
    cli("backfill", kept)
    refresh(one_connection)
    one_connection.execute("DELETE FROM analytics_events; DELETE FROM analytics_touched")
    one_connection.commit()
    cli("backfill", "--again", kept)
    assert number(one_connection, "SELECT count(*) FROM analytics_touched WHERE source = 'events'") == 1
