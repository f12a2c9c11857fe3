"""Names of the metrics that the package records itself. Public through spool/metrics.py.

This module imports nothing, so that the emitter and the helpers in spool/metrics.py can both use it.
"""

from __future__ import annotations

from typing import Final

DROPPED_METRIC: Final = "spool_dropped_count"
"""Counter, labelled cause and name: lines of an event type or a metric that the emitter dropped."""

REQUEST_COUNT: Final = "api_request_count"
"""Counter, one per request."""
REQUEST_DURATION: Final = "api_request_duration_ms"
"""Timer, from the request's arrival to the last byte of the response; `SPOOL_REQUEST_TIMER_RATE` samples it."""
REQUEST_ERRORS: Final = "api_request_error_count"
"""Counter, one per response of 500 and above and per exception that the application did not handle."""

FEED_INTERACTION_COUNT: Final = "feed_interaction_count"
"""Counter, one per interaction, labelled interaction_type."""
