"""The questions of `loader ask` and the report: each is one SQL statement.

They call the functions `analytics_*` of schema.sql, which define every figure. All questions read in one
snapshot, in a read-only transaction.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg

from loader.errors import LoaderError, UsageError
from loader.load.database import Connection, connect, is_distributed
from loader.see.names import fetch, pin
from loader.see.period import Period

_SESSIONS: Final[LiteralString] = (
    "WITH s AS (SELECT analytics_bucket(%(bucket)s, starts, %(tz)s) AS key, user_id, events, ends - starts "
    "AS lasts FROM {}) "
    "SELECT c.key::date, count(s.key), count(DISTINCT s.user_id), round(avg(s.events), 1), "
    "percentile_cont(0.5) WITHIN GROUP (ORDER BY s.lasts), percentile_cont(0.9) WITHIN GROUP (ORDER BY "
    "s.lasts), c.complete "
    "FROM analytics_calendar(%(bucket)s, %(since)s, %(until)s, %(tz)s) c LEFT JOIN s USING (key) "
    "GROUP BY c.key, c.complete ORDER BY c.key"
)
STATEMENTS: Final[Mapping[str, LiteralString]] = {
    "trend": (
        "SELECT starts, event_type, events, complete FROM "
        "analytics_trend(%(since)s, %(until)s, %(bucket)s, %(tz)s, %(types)s, top => %(top)s) ORDER BY 1, 2"
    ),
    "active": (
        "SELECT day, dau, wau, mau, stickiness, complete FROM "
        "analytics_active(%(since)s, %(until)s, %(tz)s, %(who)s, %(types)s) ORDER BY 1"
    ),
    "lifecycle": (
        "SELECT starts, new, retained, resurrected, dormant, complete FROM "
        "analytics_lifecycle(%(since)s, %(until)s, %(bucket)s, %(tz)s, %(who)s, %(types)s) ORDER BY 1"
    ),
    "retention": (
        "SELECT cohort, size, period, users, rate, complete FROM analytics_retention("
        "%(since)s, %(until)s, %(bucket)s, %(tz)s, %(periods)s, %(starting)s, %(coming)s, %(unbounded)s, "
        "%(who)s"
        ") ORDER BY 1, 3"
    ),
    "funnel": (
        "SELECT value, step, event_type, reached, of_first, of_previous, p50, p90 FROM analytics_funnel("
        "%(steps)s, %(since)s, %(until)s, %(within)s, %(strict)s, %(who)s, %(breakdown)s) ORDER BY 1, 2"
    ),
    "sessions": _SESSIONS.format("analytics_sessions(%(since)s, %(until)s)"),
    "sessions_by_gap": _SESSIONS.format("analytics_sessions_by_gap(%(since)s, %(until)s, %(gap)s)"),
    # As analytics_requests, but with the range as one bucket, because percentiles cannot be combined.
    "requests": (
        "WITH counts AS (SELECT labels->>'endpoint' AS endpoint, labels->>'method' AS method, sum(requests) "
        "AS requests, "
        "coalesce(sum(requests) FILTER (WHERE labels->>'status' ~ '^[5-9][0-9][0-9]$'), 0) AS errors "
        "FROM analytics_request_counts(%(since)s, %(until)s, 'century', %(tz)s) GROUP BY 1, 2) "
        "SELECT c.endpoint, c.method, c.requests::bigint, c.errors::bigint, round(c.errors / "
        "nullif(c.requests, 0), 5), "
        "d.p50, d.p95, d.p99 FROM counts c "
        "LEFT JOIN analytics_request_durations(%(since)s, %(until)s, 'century', %(tz)s) d "
        "ON (d.endpoint, d.method) IS NOT DISTINCT FROM (c.endpoint, c.method) ORDER BY 3 DESC, 1, 2"
    ),
    "requests_by": (
        "SELECT starts, endpoint, method, requests, errors, error_rate, p50, p95, p99, complete FROM "
        "analytics_requests(%(since)s, %(until)s, %(bucket)s, %(tz)s) ORDER BY 1, 2, 3"
    ),
    # Adjacent hours of a type form one episode. An alarm is the second of two unusual hours.
    "anomalies": (
        "WITH hours AS (SELECT *, alarm OR coalesce(lead(alarm) OVER (PARTITION BY event_type ORDER BY "
        "hour), false) "
        "AS unusual FROM analytics_anomalies(%(since)s, %(until)s, %(tz)s)), "
        "islands AS (SELECT *, hour - row_number() OVER (PARTITION BY event_type ORDER BY hour) * interval "
        "'1 hour' "
        "AS island FROM hours WHERE unusual) "
        "SELECT min(hour), max(hour) + interval '1 hour', event_type, sum(events)::bigint, "
        "round(sum(expected)::numeric), "
        "round((array_agg(z ORDER BY abs(z) DESC))[1]::numeric, 1) "
        "FROM islands GROUP BY event_type, island ORDER BY 1 DESC, 3"
    ),
    "interactions": (
        "SELECT user_id, memory_id, views, reactions, comments, round(seconds::numeric, 1), "
        "round(weight::numeric, 2), last FROM analytics_interactions(%(since)s, %(until)s, %(half_life)s) "
        "ORDER BY weight DESC, 1, 2 LIMIT %(limit)s"
    ),
    "user": (
        "SELECT timestamp, event_type, session_id, family_unit_id, metadata FROM ("
        "SELECT * FROM analytics_events WHERE user_id = %(user)s AND timestamp >= %(since)s "
        "AND timestamp < %(until)s ORDER BY timestamp DESC, id DESC LIMIT %(limit)s) e ORDER BY timestamp, id"
    ),
}  # fmt: skip
"""The statement of each question, by name."""

COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "trend": ("starts", "event_type", "events", "complete"),
    "active": ("day", "dau", "wau", "mau", "stickiness", "complete"),
    "lifecycle": ("starts", "new", "retained", "resurrected", "dormant", "complete"),
    "retention": ("cohort", "size", "period", "users", "rate", "complete"),
    "funnel": ("value", "step", "event_type", "reached", "of_first", "of_previous", "p50", "p90"),
    "sessions": ("starts", "sessions", "users", "events_mean", "length_p50", "length_p90", "complete"),
    "sessions_by_gap": ("starts", "sessions", "users", "events_mean", "length_p50", "length_p90", "complete"),
    "requests": ("endpoint", "method", "requests", "errors", "error_rate", "p50", "p95", "p99"),
    "requests_by": (
        "starts", "endpoint", "method", "requests", "errors", "error_rate", "p50", "p95", "p99", "complete",
    ),
    "anomalies": ("starts", "ends", "event_type", "events", "expected", "z"),
    "interactions": (
        "user_id", "memory_id", "views", "reactions", "comments", "seconds", "weight", "last",
    ),
    "user": ("timestamp", "event_type", "session_id", "family_unit_id", "metadata"),
}  # fmt: skip
"""The columns of each answer, with the names used in JSON and CSV."""

WHAT_ANOMALIES_MISS: Final = (
    "Unusual: two consecutive hours far from the same hours of the previous four weeks. About half of all "
    "drops by half, and most changes below 10 events an hour, are not found; weeks with holidays cause "
    "false alarms."
)
"""Recall on three data sets not used for tuning: outages 1.00, doublings .90, halvings .45."""

_TYPES: Final = (
    "WITH RECURSIVE t AS (SELECT min(event_type) AS name FROM analytics_events UNION ALL "
    "SELECT (SELECT min(event_type) FROM analytics_events WHERE event_type > t.name) FROM t WHERE t.name IS "
    "NOT NULL) "
    "SELECT name FROM t WHERE name IS NOT NULL"
)
"""Reads one index entry per type instead of every row."""
_TYPES_DISTRIBUTED: Final = "SELECT DISTINCT event_type FROM analytics_events"
"""Citus allows no recursion over a distributed table."""


@dataclass(frozen=True)
class Answer:
    """The rows of an answer, in the order of its columns."""

    question: str
    period: Period
    rows: Sequence[tuple[Any, ...]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns."""
        return COLUMNS[self.question]


@contextlib.contextmanager
def reading(dsn: str) -> Iterator[Connection]:
    """Open a read-only transaction with one snapshot. Raises LoaderError, psycopg.Error."""
    with connect(dsn) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        pin(connection)
        with _explained():
            yield connection
        connection.rollback()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable) as error:
        raise LoaderError(f"{error.diag.message_primary}: run `loader init` to add the questions") from error
    except psycopg.errors.InsufficientPrivilege as error:
        hint = "run `loader init --reader ROLE` as the owner of the tables"
        raise LoaderError(f"{error.diag.message_primary}: {hint}") from error
    except psycopg.errors.QueryCanceled as error:
        raise LoaderError(f"{error.diag.message_primary}: choose a later --since") from error
    except (psycopg.DataError, psycopg.errors.RaiseException) as error:
        raise UsageError(f"{error.diag.message_primary}: see --help for valid values") from error


def ask(connection: Connection, question: str, period: Period, **parameters: Any) -> Answer:
    """Answer a question; its parameters are those of STATEMENTS. Raises psycopg.Error."""
    values = {"since": period.since, "until": period.until, "tz": period.tz, **parameters}
    return Answer(question, period, fetch(connection, STATEMENTS[question], values))


def unknown_types(connection: Connection, names: Sequence[str]) -> Iterator[str]:
    """Yield a message for each name without any event, with a suggested name."""
    statement = _TYPES_DISTRIBUTED if is_distributed(connection) else _TYPES
    known = [name for (name,) in fetch(connection, statement)] if names else []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            yield f'no event has the type "{name}"' + (f': did you mean "{close[0]}"?' if close else "")
