"""The two tables that are loaded: their columns in the order of COPY and the key that makes a row unique."""

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

    @property
    def payload(self) -> tuple[str, ...]:
        """The columns that two rows with the same key must agree on to be duplicates."""
        return tuple(column for column in self.columns if column not in ("id", "event_id"))


EVENTS: Final = Table(
    "analytics_events",
    ("id", "event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"),
    "event_id",
    "event_type",
)
METRICS: Final = Table(
    "analytics_metrics",
    ("id", "metric_name", "metric_type", "value", "labels", "timestamp"),
    "id",
    "metric_name",
)
