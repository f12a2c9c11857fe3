"""The two loaded tables: their columns in the order of COPY, and the unique key.

Two rows with the same key are duplicates if their payloads are equal. The payload consists of the
application's values: name, user, family unit, session and `metadata` of an event; name, type, value and
`labels` of a metric. It excludes the timestamp and, at the top level of `metadata` or `labels`, the keys of
`FILLED_IN`: the emitter adds them, and they differ when a call is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, eq=False)  # used as a dictionary key for each row, so it is hashed by identity
class Table:
    """A loaded table. `kind` is the column of the event type or metric name."""

    name: str
    columns: tuple[str, ...]
    key: str
    kind: str
    payload: tuple[str, ...]
    """Columns of the payload except `details`."""
    details: str
    """The JSON column of the payload, without the keys of FILLED_IN."""


FILLED_IN: Final = ("request_id", "trace_id", "role", "service", "release", "environment")
"""Keys that the emitter adds from its context and its process-wide defaults."""
EVENTS: Final = Table(
    "analytics_events",
    ("id", "event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"),
    "event_id",
    "event_type",
    ("event_type", "user_id", "family_unit_id", "session_id"),
    "metadata",
)
METRICS: Final = Table(
    "analytics_metrics",
    ("id", "metric_name", "metric_type", "value", "labels", "timestamp"),
    "id",
    "metric_name",
    ("metric_name", "metric_type", "value"),
    "labels",
)
