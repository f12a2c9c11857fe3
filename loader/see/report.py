"""The data of the report: every figure of the page and of the summary in the terminal, from one snapshot."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

from loader.load.database import Connection
from loader.see.catalogue import FUNNEL
from loader.see.names import fetch
from loader.see.period import Period, midnight
from loader.see.questions import Answer, ask

FUNNEL_WITHIN: Final = timedelta(days=1)
SHOWN_TYPES: Final = 5
"""Number of event types with their own colour. More colours are hard to distinguish; the other types are combined."""
OTHERS: Final = "(others)"
RETENTION_WEEKS: Final = 8
LIFECYCLE_WEEKS: Final = 12
_LONGEST_BY_DAY: Final = timedelta(days=93)

_EVENTS: Final = (
    "SELECT count(*) FROM analytics_events WHERE timestamp >= %(since)s AND timestamp < %(until)s"
)
# The rows of a load have its NOW() as created_at. This distinguishes rows of a writer's segment from those of
# a backfill, whose delay is unrelated to the pipeline.
_LAG: Final = (
    "SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY created_at - timestamp), count(*) "
    "FROM analytics_events WHERE timestamp >= %(until)s - interval '1 day' AND timestamp < %(until)s AND "
    "created_at IN "
    "(SELECT loaded_at FROM analytics_loads WHERE writer IS NOT NULL AND loaded_at >= %(until)s - interval "
    "'1 day')"
)
_LEDGER: Final = (
    "SELECT coalesce(sum(lines), 0)::bigint, coalesce(sum(events), 0)::bigint, coalesce(sum(metrics), "
    "0)::bigint, "
    "coalesce(sum(duplicates), 0)::bigint, coalesce(sum(rejected), 0)::bigint, max(loaded_at) FROM "
    "analytics_loads "
    "WHERE loaded_at >= %(since)s AND loaded_at < %(until)s"
)
_DROPS: Final = (
    "SELECT coalesce(labels->>'cause', 'unknown'), sum(value)::bigint FROM analytics_metrics "
    "WHERE metric_name = 'spool_dropped_count' AND timestamp >= %(since)s AND timestamp < %(until)s "
    "GROUP BY 1 ORDER BY 2 DESC, 1"
)
_MISSING: Final = "SELECT count(*), count(DISTINCT writer) FROM analytics_missing_segments"
# -infinity: no rollup was ever computed.
_TOUCHED: Final = (
    "SELECT count(DISTINCT hour), min(hour) FILTER (WHERE isfinite(hour)), coalesce(bool_or(NOT "
    "isfinite(hour)), false) "
    "FROM analytics_touched"
)


@dataclass(frozen=True)
class Pipeline:
    """The state of the pipeline: the ledger's totals over the range, and lines lost before loading."""

    lag_half: timedelta | None
    """The median time from emit to table for the last day's events; None if no segment was loaded."""
    lag_most: timedelta | None
    """The 99th percentile of the same."""
    lines: int
    events: int
    metrics: int
    duplicates: int
    rejected: int
    last_loaded_at: datetime | None
    drops: Sequence[tuple[str, int]]
    """Causes and counts of lines dropped by emitters."""
    missing_segments: int
    missing_writers: int
    touched_hours: int
    """Hours with rows loaded after their rollup was computed; answers read these rows."""
    oldest_touched: datetime | None
    without_rollups: bool
    """Whether no rollup was computed yet, so that every answer reads rows."""


@dataclass(frozen=True)
class Report:
    """All figures of a report."""

    period: Period
    made_at: datetime
    bucket: str
    events: int
    events_before: int
    """The same figure for the preceding range of equal length."""
    trend: Answer
    active: Answer
    lifecycle: Answer
    requests: Answer
    retention: Answer
    funnel: Answer
    anomalies: Answer
    pipeline: Pipeline

    def types(self) -> Sequence[str]:
        """Return the types with their own colour, the most frequent first."""
        totals: Counter[str] = Counter()
        for _, kind, events, _ in self.trend.rows:
            totals[kind] += events
        named = sorted(totals, key=lambda kind: (-totals[kind], kind))
        return named[:SHOWN_TYPES]

    def events_by(self) -> Mapping[tuple[date, str], int]:
        """Return events by bucket and by shown type or OTHERS."""
        shown, found = set(self.types()), defaultdict[tuple[date, str], int](int)
        for starts, kind, events, _ in self.trend.rows:
            found[self._day(starts), kind if kind in shown else OTHERS] += events
        return found

    def buckets(self) -> Mapping[date, bool]:
        """Return the buckets in order, and whether each is completely inside the range."""
        return {self._day(starts): complete for starts, _, _, complete in self.trend.rows}

    def _day(self, starts: datetime) -> date:
        return starts.astimezone(self.period.zone).date()


def gather(
    connection: Connection, period: Period, steps: Sequence[str] = FUNNEL, made_at: datetime | None = None
) -> Report:
    """Run all questions. Raises psycopg.Error."""
    length = period.until - period.since
    bucket = "day" if length <= _LONGEST_BY_DAY else "week"
    before = replace(period, since=period.since - length, until=period.since)

    def last(span: timedelta) -> Period:
        return replace(period, since=period.until - span)

    everyone: dict[str, Any] = {"types": None, "who": "user"}
    return Report(
        period,
        made_at or datetime.now(UTC),
        bucket,
        _count(connection, period),
        _count(connection, before),
        ask(connection, "trend", period, bucket=bucket, types=None, top=None),
        ask(connection, "active", period, **everyone),
        ask(connection, "lifecycle", _whole_weeks(period, LIFECYCLE_WEEKS), bucket="week", **everyone),
        ask(connection, "requests", last(timedelta(days=1))),
        ask(
            connection, "retention", _whole_weeks(period, RETENTION_WEEKS + 1), bucket="week", who="user",
            periods=RETENTION_WEEKS, starting=None, coming=None, unbounded=False,
        ),
        ask(
            connection, "funnel", period, steps=list(steps), within=FUNNEL_WITHIN, strict=False, who="user",
            breakdown=None,
        ),
        ask(connection, "anomalies", last(timedelta(days=7))),
        pipeline(connection, period),
    )  # fmt: skip


def _whole_weeks(period: Period, weeks: int) -> Period:
    """Return the given number of whole weeks, of which the last contains the end of the range."""
    last = (period.until - timedelta(microseconds=1)).astimezone(period.zone).date()
    monday = last - timedelta(days=last.weekday(), weeks=weeks - 1)
    return replace(period, since=midnight(monday, period.zone).astimezone(UTC))


def pipeline(connection: Connection, period: Period) -> Pipeline:
    """Read the state of the pipeline. Raises psycopg.Error."""
    values = {"since": period.since, "until": period.until}
    ((lag, _),) = fetch(connection, _LAG, values)
    ((lines, events, metrics, duplicates, rejected, last),) = fetch(connection, _LEDGER, values)
    ((missing, writers),) = fetch(connection, _MISSING)
    ((touched, oldest, without_rollups),) = fetch(connection, _TOUCHED)
    half, most = lag or (None, None)
    return Pipeline(
        half, most, lines, events, metrics, duplicates, rejected, last,
        fetch(connection, _DROPS, values), missing, writers, touched, oldest, without_rollups,
    )  # fmt: skip


def _count(connection: Connection, period: Period) -> int:
    ((events,),) = fetch(connection, _EVENTS, {"since": period.since, "until": period.until})
    return int(events)
