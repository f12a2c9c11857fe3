"""Benchmark of the questions, of the time that rollups save, and of marking touched hours.

    python -m tests.bench.see [--events N] [--version 15|18 ...] [--repeat N] [--part NAME ...]

Parts: questions (each against `SELECT count(*)` over the same range in the same run, with the indexes of its
plan), rollups (against plain SQL over rows), refresh, marks (the load with and without them). Times are CPU
seconds of the server process of our connection, which other processes affect little; medians.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from loader.demo import embedded
from loader.files.chunk import chunks
from loader.load import batch, indexes, marks, outcome, rollups, schema
from loader.load.database import Connection, connect
from loader.load.decode import Row
from loader.load.tables import EVENTS
from tests.bench.load import events as lines

TYPES = (
    "feed_viewed", "memory_viewed", "reaction_created", "comment_created", "memory_posted", "user_logged_in",
    "user_logged_out", "reaction_deleted", "memory_updated", "memory_deleted", "comment_updated",
    "comment_deleted",
    "invite_created", "invite_accepted", "child_provisioned", "pet_created",
)  # fmt: skip
"""From frequent to rare; a user's first event is user_registered."""
END = "timestamptz '2026-06-01 00:00+00'"
_EVENTS = f"""
INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata)
SELECT gen_random_uuid(), CASE WHEN position = 1 AND number < %(users)s THEN 'user_registered'
        ELSE (%(types)s::text[])[1 + floor(16 * random() ^ 3)::int] END,
    at + (position - 1) * random() * interval '1 minute', md5('u' || person)::uuid,
    md5('f' || person / 2)::uuid, md5('s' || number)::uuid,
    jsonb_build_object('memory_id', md5('m' || floor(random() * 500))::uuid, 'duration_ms',
        floor(random() * 9000), 'source', 'feed', 'request_id', md5(random()::text))
FROM (
    SELECT number,
        CASE WHEN number < %(users)s THEN number ELSE floor(%(users)s * random() ^ 2)::int END AS person,
        {END} - random() * interval '90 days' AS at, 1 + (random() * 18)::int AS size
    FROM generate_series(0, %(events)s / 10) AS number
) AS session, generate_series(1, size) AS position ORDER BY 3
"""
_METRICS = f"""
INSERT INTO analytics_metrics (metric_name, metric_type, value, labels, timestamp)
SELECT name, kind, CASE kind WHEN 'counter' THEN 1 ELSE round(exp(3 + random() + random())::numeric, 3) END,
    jsonb_build_object('endpoint', '/' || length(event_type) %% 8, 'method', 'GET', 'status',
        CASE WHEN random() < 0.01 THEN '500' ELSE '200' END), timestamp
FROM analytics_events,
    (VALUES ('api_request_count', 'counter'), ('api_request_duration_ms', 'timer')) AS names (name, kind)
WHERE timestamp >= {END} - interval '30 days' ORDER BY timestamp
"""
QUESTIONS = {
    "trend, 90 d by day": (90, "trend({0}, 'day', 'America/New_York')"),
    "trend, 7 d by hour": (7, "trend({0}, 'hour', 'America/New_York')"),
    "trend with people, 30 d": (30, "trend({0}, 'day', 'America/New_York', NULL, true)"),
    "active, 90 d": (90, "active({0}, 'America/New_York')"),
    "active families, 30 d": (30, "active({0}, 'America/New_York', 'family')"),
    "active by type, 30 d": (30, "active({0}, 'America/New_York', 'user', ARRAY['memory_viewed'])"),
    "lifecycle, 12 weeks": (84, "lifecycle({0}, 'week', 'America/New_York')"),
    "retention, 12 weeks": (84, "retention({0}, 'week', 'America/New_York', 11)"),
    "retention from user_registered": (
        84, "retention({0}, 'week', 'America/New_York', 11, ARRAY['user_registered'], ARRAY['memory_viewed'])"
    ),
    "funnel, 3 frequent steps, 30 d": (
        30, "funnel(ARRAY['feed_viewed', 'memory_viewed', 'reaction_created'], {0}, '10 minutes')"
    ),
    "funnel, strict, 30 d": (30, "funnel(ARRAY['feed_viewed', 'memory_viewed'], {0}, '10 minutes', true)"),
    "funnel, 4 rare steps, 90 d": (
        90, "funnel(ARRAY['user_registered', 'invite_created', 'invite_accepted', 'pet_created'], {0}, '14 "
        "days')"
    ),
    "sessions, 30 d": (30, "sessions({0})"),
    "sessions by gap, 30 d": (30, "sessions_by_gap({0})"),
    "requests, 24 h by minute": (1, "requests({0}, 'minute')"),
    "requests, 30 d by day": (30, "requests({0}, 'day', 'America/New_York')"),
    "anomalies, 7 d": (7, "anomalies({0}, 'America/New_York')"),
    "interactions, 30 d": (30, "interactions({0})"),
    "features, all users": (28, "features({1}, 'America/New_York')"),
}  # fmt: skip
ROWS = {
    "trend, 90 d by day": (
        "SELECT date_trunc('day', timestamp, 'America/New_York'), event_type, count(*) FROM analytics_events "
        "WHERE timestamp >= {since} AND timestamp < {until} GROUP BY 1, 2"
    ),
    "requests, 30 d by day": (
        "SELECT date_trunc('day', timestamp, 'America/New_York'), labels->>'endpoint', labels->>'method', "
        "count(*) FILTER (WHERE metric_name = 'api_request_count'), count(*) FILTER (WHERE metric_name = "
        "'api_request_count' AND labels->>'status' >= '500'), percentile_disc(ARRAY[0.5, 0.95, 0.99]) "
        "WITHIN GROUP "
        "(ORDER BY value) FILTER (WHERE metric_name = 'api_request_duration_ms') FROM analytics_metrics "
        "WHERE "
        "metric_name IN ('api_request_count', 'api_request_duration_ms') AND timestamp >= {since} AND "
        "timestamp < {until} "
        "GROUP BY 1, 2, 3"
    ),
}
TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--version", type=int, nargs="+", default=[15, 18])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--part", nargs="+", default=["questions", "rollups", "refresh", "marks"])
    options = parser.parse_args()
    for version in options.version:
        with embedded.server(version, "-c", "shared_buffers=1GB", "-c", "max_wal_size=8GB") as dsn:
            measure(dsn, version, options)


def measure(dsn: str, version: int, options: argparse.Namespace) -> None:
    with connect(dsn) as connection:
        schema.apply_schema(connection)
        connection.commit()
        if "marks" in options.part:
            marking(connection, options.repeat)
        if {"questions", "rollups", "refresh"} & set(options.part):
            fill(connection, options.events)
            filled = [counted(connection, table) for table in ("events", "metrics")]
            print(f"\nPostgreSQL {version}: {filled[0]} events, {filled[1]} metrics", flush=True)
            refreshing(connection)
            if "questions" in options.part:
                questions(connection, options.repeat)
            if "rollups" in options.part:
                speedups(connection, options.repeat)


def counted(connection: Connection, table: str) -> int:
    ((count,),) = connection.execute(f"SELECT count(*) FROM analytics_{table}".encode()).fetchall()
    return int(count)


def fill(connection: Connection, events: int) -> None:
    connection.execute("SET maintenance_work_mem = '512MB'")
    connection.execute("TRUNCATE analytics_events, analytics_metrics, analytics_touched")
    connection.execute(
        "DROP INDEX analytics_events_type_seen, analytics_events_user_seen, analytics_events_timestamp, "
        "analytics_metrics_timestamp"
    )
    connection.execute(_EVENTS.encode(),
                       {"events": events, "users": events // 200, "types": list(TYPES)})  # fmt: skip
    connection.execute(_METRICS.replace("%%", "%").encode())
    connection.execute(
        "INSERT INTO analytics_touched VALUES ('-infinity', 'events'), ('-infinity', 'metrics')"
    )
    connection.commit()
    indexes.build(connection)
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")
    connection.autocommit = False


def refreshing(connection: Connection) -> None:
    """The first refresh computes everything."""
    connection.commit()
    begun, cpu = time.monotonic(), used(connection)
    done = rollups.refresh(connection)
    connection.rollback()
    took = time.monotonic() - begun
    print(f"refresh of {done} hours and days: {used(connection) - cpu:.1f} CPU s, {took:.1f} s", flush=True)
    connection.autocommit = True
    connection.execute("VACUUM ANALYZE")
    for table in ("hourly_events", "hourly_metrics", "user_days"):
        ((rows, size),) = connection.execute(
            f"SELECT count(*), pg_size_pretty(pg_total_relation_size('analytics_{table}')) FROM "
            f"analytics_{table}".encode()
        ).fetchall()
        print(f"  analytics_{table}: {rows} rows, {size}")
    connection.autocommit = False


def questions(connection: Connection, repeat: int) -> None:
    _settings(connection)
    print(f"{'question':34} {'CPU s':>7} {'count(*)':>8} {'ratio':>6}  indexes")
    for name, (days, call) in QUESTIONS.items():
        since, until = f"{END} - interval '{days} days'", END
        table = "metrics" if call.startswith("requests") else "events"
        floor = median(
            connection,
            f"SELECT count(*) FROM analytics_{table} WHERE timestamp >= {since} AND timestamp < {until}",
            repeat,
        )
        statement = f"SELECT * FROM analytics_{call.format(f'{since}, {until}', until)}"
        cost = median(connection, statement, repeat)
        used_indexes = ", ".join(plan_indexes(connection, statement))
        print(f"{name:34} {cost:7.3f} {floor:8.3f} {cost / floor:6.1f}  {used_indexes}", flush=True)


def speedups(connection: Connection, repeat: int) -> None:
    _settings(connection)
    for name, rows in ROWS.items():
        days, call = QUESTIONS[name]
        since, until = f"{END} - interval '{days} days'", END
        from_rows = median(connection, rows.format(since=since, until=until), repeat)
        rolled = median(
            connection, f"SELECT * FROM analytics_{call.format(f'{since}, {until}', until)}", repeat, 10
        )
        print(
            f"{name}: rows {from_rows:.3f} CPU s, rollup {rolled:.4f}: {from_rows / rolled:.0f} x", flush=True
        )


def _settings(connection: Connection) -> None:
    connection.execute("SET jit = off; SET max_parallel_workers_per_gather = 0; SET work_mem = '64MB'")
    connection.commit()


def median(connection: Connection, statement: str, repeat: int, times: int = 1) -> float:
    """Return the CPU seconds of one run; `times` runs are measured together, because the clock ticks in 10 ms."""
    measured = []
    for _ in range(repeat + 1):  # the first warms the cache
        before = used(connection)
        for _ in range(times):
            with connection.transaction():
                connection.execute(f"EXPLAIN (ANALYZE, TIMING off) {statement}".encode())
        measured.append((used(connection) - before) / times)
    return max(statistics.median(measured[1:]), 0.01 / times / 2)


def plan_indexes(connection: Connection, statement: str) -> list[str]:
    """Return the indexes and whole tables that a run of the statement scanned, also within functions."""
    before = _scans(connection)
    with connection.transaction():
        connection.execute(statement.encode())
        connection.execute("SELECT pg_stat_force_next_flush()")
    after = _scans(connection)
    return sorted(name.removeprefix("analytics_") for name in after if after[name] != before.get(name))


def _scans(connection: Connection) -> dict[str, int]:
    with connection.transaction():
        found = connection.execute(
            "SELECT indexrelname, idx_scan FROM pg_stat_user_indexes UNION ALL "
            "SELECT 'seq scan of ' || relname, seq_scan FROM pg_stat_user_tables "
            "WHERE relname IN ('analytics_events', 'analytics_metrics')"
        ).fetchall()
    return dict(found)


def used(connection: Connection) -> float:
    """Return the CPU seconds of the server process so far."""
    fields = Path(f"/proc/{connection.info.backend_pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# ---- marks --------------------------------------------------------------------------------------------


def marking(connection: Connection, repeat: int, count: int = 100_000) -> None:
    """Alternate loads with and without marks into an empty table; compare the CPU seconds of both sides."""
    data = b"\n".join(lines(count, 7)) + b"\n"
    with_marks: list[float] = []
    without: list[float] = []
    for _ in range(max(5, repeat)):
        without.append(_load(connection, data, marked=False))
        with_marks.append(_load(connection, data, marked=True))
    ratio = statistics.median(with_marks) / statistics.median(without)
    print(f"\nload of {count} events: {statistics.median(without):.2f} CPU s without marks, "
          f"{statistics.median(with_marks):.2f} with: {ratio - 1:+.1%}")  # fmt: skip


def _load(connection: Connection, data: bytes, *, marked: bool) -> float:
    connection.execute("TRUNCATE analytics_events, analytics_metrics, analytics_loads, analytics_touched")
    connection.commit()
    with ExitStack() as stack:
        if not marked:
            stack.enter_context(mock.patch.object(marks, "record", return_value=None))
            stack.enter_context(mock.patch.object(outcome.Outcome, "insert", _count))
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        begun = time.process_time() + used(connection)
        for chunk in chunks(io.BytesIO(data), "bench.ndjson"):
            batch.load(connection, [chunk], spool)
            connection.commit()
        return time.process_time() + used(connection) - begun


def _count(self: outcome.Outcome, row: Row) -> None:
    """Do as `Outcome.insert`, without recording the hour."""
    if row.table is EVENTS:
        self.events += 1
    else:
        self.metrics += 1


if __name__ == "__main__":
    main()
