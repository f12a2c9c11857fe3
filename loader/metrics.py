"""How a loader is doing, for Prometheus: on a port of this machine only, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loader.errors import UsageError
from loader.health import BUCKETS, Health
from loader.watch import backlog

ADDRESS: Final = "127.0.0.1"


def serve(port: int, spool: Path, health: Health) -> None:
    """Answer scrapes in a thread of its own. Raises UsageError where the port can't be had."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Standing(spool, health))
    try:
        start_http_server(port, ADDRESS, registry)
    except OSError as error:
        raise UsageError(
            f"metrics port {port} can't be had: {error.strerror}: choose another --metrics-port"
        ) from None


class _Standing(Collector):
    """What a loader and its spool are like at the moment of a scrape."""

    def __init__(self, spool: Path, health: Health) -> None:
        self._spool = spool
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health = self._health
        up = health.connected and health.waits_for is None
        yield GaugeMetricFamily(
            "analytics_loader_up", "1 where rows can be loaded, 0 where that waits.", value=up
        )
        yield from self._spool_metrics()
        rows = CounterMetricFamily("analytics_loader_rows", "Rows that were inserted.", labels=["table"])
        rows.add_metric(["analytics_events"], health.tally.events)
        rows.add_metric(["analytics_metrics"], health.tally.metrics)
        yield rows
        for name, meaning, value in (
            ("files", "Sealed files that were loaded whole.", health.files),
            ("bytes", "Bytes of lines that were loaded.", health.tally.bytes),
            ("duplicates", "Lines whose equal row was there already.", health.tally.duplicates),
            ("rejects", "Lines that were rejected.", health.tally.rejected),
            ("known_lines", "Lines that the ledger knew already.", health.tally.known),
            ("retries", "Tries of a batch that failed and were repeated.", health.retries),
        ):
            yield CounterMetricFamily(f"analytics_loader_{name}", meaning, value=value)
        counts = [float(count) for count in accumulate(health.buckets)]
        bounds = [*map(str, BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "analytics_loader_batch_seconds", "How long a transaction of chunks took.",
            buckets=list(zip(bounds, counts, strict=True)), sum_value=health.seconds,
        )  # fmt: skip

    def _spool_metrics(self) -> Iterator[Metric]:
        try:
            waiting = backlog(self._spool)
        except OSError:
            return  # what can't be seen has no value
        for name, meaning, value in (
            ("backlog_files", "Sealed files that wait.", waiting.sealed_files),
            ("backlog_bytes", "Bytes of the sealed files that wait.", waiting.sealed_bytes),
            (
                "oldest_sealed_seconds",
                "Age of the oldest sealed file, 0 where none waits.",
                waiting.lag_seconds,
            ),
            (
                "open_segments",
                "Segments that are being written, or whose writer died.",
                waiting.open_segments,
            ),
        ):
            yield GaugeMetricFamily(f"analytics_spool_{name}", meaning, value=value)
