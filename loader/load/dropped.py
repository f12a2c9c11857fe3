"""Counts the lines that emitters dropped, from their metrics, by cause and event type or metric name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from loader.load.database import Connection
from spool.drops import Report
from spool.metric_names import DROPPED_METRIC

LARGEST: Final = 100
"""Number of kinds shown, those with the most drops first."""
_DROPPED: Final = """
    SELECT coalesce(labels OPERATOR(pg_catalog.->>) 'cause'::text, '?'),
        coalesce(labels OPERATOR(pg_catalog.->>) 'name'::text, '?'), pg_catalog.sum(value)::bigint
    FROM analytics_metrics
    WHERE metric_name::text OPERATOR(pg_catalog.=) %s::text
        AND (%s::interval IS NULL OR timestamp > pg_catalog.now() - %s::interval)
    GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2 LIMIT %s
"""


def dropped(connection: Connection, within: str | None = None) -> dict[str, int]:
    """Return all drops, or those within an interval, by "cause name". Raises psycopg.Error."""
    found = connection.execute(_DROPPED.encode(), [DROPPED_METRIC, within, within, LARGEST])
    return {f"{cause} {name}": int(count) for cause, name, count in found}


def unreported(reports: Iterable[Report]) -> Mapping[str, int]:
    """Return the drops that no metric has reported yet, by "cause name"."""
    counts: dict[str, int] = {}
    for (cause, name), begin, end in reports:
        counts[f"{cause} {name}"] = counts.get(f"{cause} {name}", 0) + end - begin
    return counts
