"""What the command line knows of the questions before it imports what answers them."""

from __future__ import annotations

from typing import Final, Literal

FUNNEL: Final = ("feed_viewed", "memory_viewed", "reaction_created")
"""The steps of a report's funnel if none are given: from the catalogue of spool.events."""
MOST_STEPS: Final = 12
"""The limit of analytics_funnel."""

Format = Literal["parquet", "csv", "ndjson"]
FORMATS: Final[tuple[Format, ...]] = ("parquet", "csv", "ndjson")
TABLES: Final = ("events", "metrics")
"""What can be exported, and as what."""
