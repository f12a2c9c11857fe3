"""The awaitable face: what a request handler calls. Nothing here waits."""

from __future__ import annotations

from functools import cache
from typing import Any

from spool.emitter import Emitter, get_emitter
from spool.timer import Timer


class AnalyticsService:
    """The calls of `Emitter`, awaitable. Each returns the id as text, or None if the line was dropped."""

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter

    async def emit_event(
        self, *, event_type: str, user_id: Any = None, family_unit_id: Any = None, session_id: Any = None,
        metadata: dict[str, Any] | None = None, event_id: Any = None, timestamp: Any = None,
    ) -> str | None:  # fmt: skip
        """See `Emitter.emit_event`."""
        try:
            return self.emitter.emit_event(
                event_type=event_type, user_id=user_id, family_unit_id=family_unit_id, session_id=session_id,
                metadata=metadata, event_id=event_id, timestamp=timestamp,
            )  # fmt: skip
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return None

    def timer(self, metric_name: str, labels: dict[str, Any] | None = None) -> Timer:
        """See `Emitter.timer`."""
        return self.emitter.timer(metric_name, labels)

    async def increment_counter(
        self, *, metric_name: str, value: Any = 1, labels: dict[str, Any] | None = None
    ) -> str | None:
        """See `Emitter.record_metric`; the value must not be below zero."""
        try:
            return self.emitter.increment_counter(metric_name=metric_name, value=value, labels=labels)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return None

    async def record_gauge(
        self, *, metric_name: str, value: Any, labels: dict[str, Any] | None = None
    ) -> str | None:
        """See `Emitter.record_metric`."""
        try:
            return self.emitter.record_gauge(metric_name=metric_name, value=value, labels=labels)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return None

    async def record_timer(
        self, *, metric_name: str, duration_ms: Any, labels: dict[str, Any] | None = None
    ) -> str | None:
        """See `Emitter.record_metric`; the duration is in milliseconds."""
        try:
            return self.emitter.record_timer(metric_name=metric_name, duration_ms=duration_ms, labels=labels)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return None

    async def record_metric(
        self, *, metric_name: str, metric_type: str, value: Any, labels: dict[str, Any] | None = None
    ) -> str | None:
        """See `Emitter.record_metric`."""
        try:
            return self.emitter.record_metric(
                metric_name=metric_name, metric_type=metric_type, value=value, labels=labels
            )
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return None


@cache
def get_analytics_service() -> AnalyticsService:
    """Return the process-wide service, set up from the environment. Never raises; see `get_emitter`."""
    return AnalyticsService(get_emitter())
