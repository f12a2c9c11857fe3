"""The awaitable interface for request handlers. Each call emits immediately and returns an awaitable."""

from __future__ import annotations

from functools import cache

from spool.annotations import EventId, Id, Metadata, MetricType, Moment, Number
from spool.awaitable import NOT_EMITTED, Emitted, coroutine_function
from spool.emitter import Emitter, get_emitter
from spool.timer import Timer


class AnalyticsService:
    """The calls of `Emitter` as awaitables. Each emits when it is called, whether or not it is awaited.

    Awaiting returns the id as text, or None if the line was dropped.
    """

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter
        for call in (
            AnalyticsService.emit_event, AnalyticsService.increment_counter, AnalyticsService.record_gauge,
            AnalyticsService.record_timer, AnalyticsService.record_metric,
        ):  # fmt: skip
            coroutine_function(call)

    def emit_event(
        self, *, event_type: str, user_id: Id | None = None, family_unit_id: Id | None = None,
        session_id: Id | None = None, metadata: Metadata | None = None, event_id: EventId | None = None,
        timestamp: Moment | None = None,
    ) -> Emitted:  # fmt: skip
        """See `Emitter.emit_event`."""
        try:
            awaitable = Emitted()
            awaitable.event_id = self.emitter.emit_event(
                event_type=event_type, user_id=user_id, family_unit_id=family_unit_id, session_id=session_id,
                metadata=metadata, event_id=event_id, timestamp=timestamp,
            )  # fmt: skip
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable

    def timer(self, metric_name: str, labels: Metadata | None = None) -> Timer:
        """See `Emitter.timer`."""
        return self.emitter.timer(metric_name, labels)

    def increment_counter(
        self, *, metric_name: str, value: Number = 1, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> Emitted:  # fmt: skip
        """See `Emitter.record_metric`; the value must not be below zero."""
        try:
            awaitable = Emitted()
            awaitable.event_id = self.emitter._metric(metric_name, "counter", value, labels, timestamp)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable

    def record_gauge(
        self, *, metric_name: str, value: Number, labels: Metadata | None = None, timestamp: Moment | None = None
    ) -> Emitted:  # fmt: skip
        """See `Emitter.record_metric`."""
        try:
            awaitable = Emitted()
            awaitable.event_id = self.emitter._metric(metric_name, "gauge", value, labels, timestamp)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable

    def record_timer(
        self, *, metric_name: str, duration_ms: Number, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> Emitted:  # fmt: skip
        """See `Emitter.record_metric`; the duration is in milliseconds."""
        try:
            awaitable = Emitted()
            awaitable.event_id = self.emitter._metric(metric_name, "timer", duration_ms, labels, timestamp)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable

    def record_metric(
        self, *, metric_name: str, metric_type: MetricType, value: Number, labels: Metadata | None = None,
        timestamp: Moment | None = None,
    ) -> Emitted:  # fmt: skip
        """See `Emitter.record_metric`."""
        try:
            awaitable = Emitted()
            awaitable.event_id = self.emitter._metric(metric_name, metric_type, value, labels, timestamp)
        except RecursionError:
            self.emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable


@cache
def get_analytics_service() -> AnalyticsService:
    """Return the process-wide service, set up from the environment. Never raises; see `get_emitter`."""
    return AnalyticsService(get_emitter())
