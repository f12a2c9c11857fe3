"""Constants of the questions that the command line needs without importing their implementation."""

from __future__ import annotations

from typing import Final, Literal

FUNNEL: Final = ("feed_viewed", "memory_viewed", "reaction_created")
"""The default steps of a report's funnel, from the catalogue of spool.events."""
MOST_STEPS: Final = 12
"""The maximum number of steps of analytics_funnel."""

Format = Literal["parquet", "csv", "ndjson"]
FORMATS: Final[tuple[Format, ...]] = ("parquet", "csv", "ndjson")
TABLES: Final = ("events", "metrics")
"""The exportable tables and the export formats."""
