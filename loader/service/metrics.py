"""Serves the health and metrics of a loader over HTTP, by default on this machine only.

/healthz            200 while rows can be loaded, otherwise 503 with the reason in one line
any other path      the metrics for Prometheus
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from loader.errors import UsageError, one_line
from loader.files.scan import backlog
from loader.service.health import BUCKETS, Health

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

ADDRESS: Final = "127.0.0.1"
_HEALTH_PATH: Final = "/healthz"


def serve(address: str, port: int, spool: Path, health: Health) -> None:
    """Serve requests in separate threads. Raises UsageError if the address or the port is not available."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_LoaderCollector(spool, health))
    try:
        server = _bound(address, port)
    except OSError as error:
        raise UsageError(
            f'cannot listen on metrics port {port} of "{address}": {error.strerror}: '
            "choose another --metrics-port or --metrics-address"
        ) from None
    server.set_app(_Application(registry, health))
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Application:
    """A WSGI application: /healthz, and prometheus_client's application for all other paths."""

    def __init__(self, registry: CollectorRegistry, health: Health) -> None:
        self._metrics = make_wsgi_app(registry)
        self._health = health

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("PATH_INFO") != _HEALTH_PATH:
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        obstacle = self._health.obstacle()
        status = "200 OK" if obstacle is None else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{one_line(obstacle or 'ok')}\n".encode()]


def _bound(address: str, port: int) -> _Server:
    """Return a server bound to the first resolved address of a host name or address. Raises OSError."""
    family, *_, resolved = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    server = _Server((str(resolved[0]), port), _Silent, bind_and_activate=False)
    server.socket.close()
    server.address_family, server.socket = family, socket.socket(family, socket.SOCK_STREAM)
    server.server_bind()
    server.server_activate()
    return server


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without http.server's reverse lookup, which may take seconds without a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Silent(WSGIRequestHandler):
    """Does not log requests: there is a probe every few seconds."""

    timeout = 30  # seconds to wait for a client that sends nothing

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the standard library
        pass


class _LoaderCollector(Collector):
    """Collects the metrics of a loader and its spool at each request."""

    def __init__(self, spool: Path, health: Health) -> None:
        self._spool = spool
        self._health = health

    def collect(self) -> Iterator[Metric]:
        health, counts = self._health, self._health.total.counts
        up = health.obstacle() is None
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
            ("erased", "Lines of people and families that were erased.", counts.erased),
            ("expired", "Lines that are older than what was pruned, and were not loaded.", counts.expired),
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
            return  # unreadable values are omitted
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
