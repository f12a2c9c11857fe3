"""The status of a loader for Prometheus: on a port of this machine only, collected at each scrape."""

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
from loader.files.scan import backlog
from loader.service.health import BUCKETS, Health

ADDRESS: Final = "127.0.0.1"


def serve(port: int, spool: Path, health: Health) -> None:
    """Answer scrapes in a thread of its own. Raises UsageError if the port is not available."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_LoaderCollector(spool, health))
    try:
        start_http_server(port, ADDRESS, registry)
    except OSError as error:
        raise UsageError(
            f"cannot listen on metrics port {port}: {error.strerror}: choose another --metrics-port"
        ) from None


class _LoaderCollector(Collector):
    """Collects the status of a loader and its spool."""

    def __init__(self, spool: Path, health: Health) -> None:
        self._spool = spool
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health, counts = self._health, self._health.total.counts
        up = health.connected and health.waits_for is None
        yield GaugeMetricFamily(
            "analytics_loader_up", "1 if rows can be loaded, 0 while the loader waits.", value=up
        )
        yield from self._spool_metrics()
        rows = CounterMetricFamily("analytics_loader_rows", "Rows that were inserted.", labels=["table"])
        rows.add_metric(["analytics_events"], counts.events)
        rows.add_metric(["analytics_metrics"], counts.metrics)
        yield rows
        for name, meaning, value in (
            ("files", "Sealed files that were loaded whole.", health.files),
            ("bytes", "Bytes of lines that were loaded.", health.total.bytes),
            ("duplicates", "Lines whose equal row existed.", counts.duplicates),
            ("rejects", "Lines that were rejected.", counts.rejected),
            ("known_lines", "Lines that the ledger already knew.", health.total.known),
            ("retries", "Attempts to load a batch that failed and were repeated.", health.retries),
        ):
            yield CounterMetricFamily(f"analytics_loader_{name}", meaning, value=value)
        dropped = CounterMetricFamily(
            "analytics_spool_dropped", "Lines that emitters dropped, as their metrics report.",
            labels=["cause", "name"],
        )  # fmt: skip
        for kind, count in health.total.dropped.items():
            dropped.add_metric(kind, count)
        yield dropped
        cumulative = [float(count) for count in accumulate(health.buckets)]
        bounds = [*map(str, BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "analytics_loader_batch_seconds", "Duration of the transaction of a batch.",
            buckets=list(zip(bounds, cumulative, strict=True)), sum_value=health.seconds,
        )  # fmt: skip

    def _spool_metrics(self) -> Iterator[Metric]:
        try:
            waiting = backlog(self._spool)
        except OSError:
            return  # what cannot be read has no value
        for name, meaning, value in (
            ("backlog_files", "Sealed files that wait.", waiting.sealed_files),
            ("backlog_bytes", "Bytes of the sealed files that wait.", waiting.sealed_bytes),
            (
                "oldest_sealed_seconds",
                "Age of the oldest sealed file, 0 if none waits.",
                waiting.lag_seconds,
            ),
            (
                "open_segments",
                "Segments that are being written, or whose writer died.",
                waiting.open_segments,
            ),
        ):
            yield GaugeMetricFamily(f"analytics_spool_{name}", meaning, value=value)
