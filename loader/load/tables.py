"""The two tables that are loaded: their columns in the order of COPY and the key that makes a row unique.

Two rows with the same key are duplicates if their payloads are equal. The payload is what the application
gave: the name, the user, the family unit, the session and `metadata`; of a metric its name, type, value and
`labels`. What the emitter fills in by itself differs when the same call is made again, so it does not count:
the timestamp and, at the top level of `metadata` or `labels`, the keys of `FILLED_IN`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, eq=False)  # a key of dictionaries in the loop over rows: its hash is its identity
class Table:
    """A table that is loaded. `kind` is the column that names what a row is about."""

    name: str
    columns: tuple[str, ...]
    key: str
    kind: str
    payload: tuple[str, ...]
    """Columns of the payload but `details`."""
    details: str
    """The column that is an object, of which FILLED_IN does not count."""


FILLED_IN: Final = ("request_id", "trace_id", "role", "service", "release", "environment")
"""What the emitter adds from its context and its process-wide defaults."""
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
