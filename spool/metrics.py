"""Names of the metrics that the package itself records, and helpers for the application's metrics."""

from __future__ import annotations

from typing import Final

from spool.annotations import Id, Metadata
from spool.awaitable import NOT_EMITTED, Emitted, coroutine_function
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


@coroutine_function
def log_feed_interaction(
    *,
    interaction_type: str,
    user_id: Id | None = None,
    family_unit_id: Id | None = None,
    metadata: Metadata | None = None,
) -> Emitted:
    """Count an interaction with the feed (scroll, tap, like, ...) and emit an event with the user's id.

    Both are emitted by the call. Awaiting returns the event's id, or None if it was dropped.
    """
    emitter = None
    try:
        emitter = get_emitter()
        emitter.increment_counter(
            metric_name=FEED_INTERACTION_COUNT, labels={"interaction_type": interaction_type}
        )
        awaitable = Emitted()
        awaitable.event_id = emitter.emit_event(
            event_type=FEED_INTERACTION,
            user_id=user_id,
            family_unit_id=family_unit_id,
            metadata={**(metadata or {}), "interaction_type": interaction_type},
        )
    except RecursionError:
        if emitter is not None:
            emitter._drops.too_deep += 1
        return NOT_EMITTED
    return awaitable
