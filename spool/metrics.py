"""The names of the metrics that the package records itself, and helpers for those of the application."""

from __future__ import annotations

from typing import Any, Final

from spool.emitter import get_emitter
from spool.metric_names import (
    DROPPED_METRIC,
    FEED_INTERACTION_COUNT,
    REQUEST_COUNT,
    REQUEST_DURATION,
    REQUEST_ERRORS,
)

__all__ = [
    "DROPPED_METRIC", "FEED_INTERACTION", "FEED_INTERACTION_COUNT", "REQUEST_COUNT", "REQUEST_DURATION",
    "REQUEST_ERRORS", "log_feed_interaction",
]  # fmt: skip

FEED_INTERACTION: Final = "feed_interaction"
"""Event, one per interaction, with the user and the family."""


async def log_feed_interaction(
    *,
    interaction_type: str,
    user_id: Any = None,
    family_unit_id: Any = None,
    metadata: dict[str, Any] | None = None,
) -> str | None:
    """Count an interaction with the feed (scroll, tap, like, ...) and emit an event that says whose it was.

    Returns the event's id, or None if it was dropped.
    """
    emitter = None
    try:
        emitter = get_emitter()
        emitter.increment_counter(
            metric_name=FEED_INTERACTION_COUNT, labels={"interaction_type": interaction_type}
        )
        return emitter.emit_event(
            event_type=FEED_INTERACTION,
            user_id=user_id,
            family_unit_id=family_unit_id,
            metadata={**(metadata or {}), "interaction_type": interaction_type},
        )
    except RecursionError:
        if emitter is not None:
            emitter._drops.too_deep += 1
        return None
