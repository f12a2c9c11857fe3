"""Alternatives to the spool, each configured according to its documentation.

A sink is created in an empty directory and has two functions: the timed call, and a count of the surviving
records, which another process calls after a SIGKILL. Network sinks have a collector on this host that
responds immediately; the records it received have survived.
"""

from __future__ import annotations

import http.server
import itertools
import json
import os
import socket
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

Call = Callable[[], object]

USER, FAMILY, SESSION = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
METADATA = {"memory_id": str(uuid.uuid4()), "title": "Family Vacation", "media_count": 3}
LABELS = {"endpoint": "/api/v1/memories", "method": "POST"}
READY = {
    "event_id": str(uuid.uuid4()), "event_type": "memory_posted", "timestamp": datetime.now(UTC),
    "user_id": USER, "family_unit_id": FAMILY, "session_id": SESSION, "metadata": METADATA,
}  # fmt: skip
"""A record whose ids are UUID objects and whose timestamp is a datetime."""
_FIELDS = {"user_id": str(USER), "family_unit_id": str(FAMILY), "meta": METADATA}
_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z


def _nothing() -> None:
    """Do nothing, as most sinks before a call."""


@dataclass(frozen=True)
class Sink:
    """`make(directory)` returns the call; `survivors(directory)` counts the records afterwards."""

    name: str
    make: Callable[[Path], Call]
    survivors: Callable[[Path], int]
    events: bool = True
    """False if it only adds up numbers and keeps no records."""
    awaited: bool = False
    """Whether the call returns something to await."""
    prepare: Call = _nothing
    """Called before each call, outside of what is timed."""


def lines_in(*patterns: str) -> Callable[[Path], int]:
    return lambda home: sum(
        file.read_bytes().count(b"\n") for pattern in patterns for file in home.rglob(pattern)
    )


def rows_in(query: str) -> Callable[[Path], int]:
    def count(home: Path) -> int:
        with sqlite3.connect(next(home.rglob("*.db"))) as database:
            return int(database.execute(query).fetchone()[0])

    return count


def floor(home: Path) -> Call:
    fd = os.open(home / "floor.ndjson", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    return lambda: os.write(fd, orjson.dumps(READY, None, _LINE))


def spool_event(home: Path) -> Call:
    from spool import Emitter

    emitter = Emitter(home / "spool")
    return lambda: emitter.emit_event(
        event_type="memory_posted", user_id=USER, family_unit_id=FAMILY, session_id=SESSION, metadata=METADATA
    )


def spool_awaited(home: Path) -> Call:
    from spool import AnalyticsService, Emitter

    analytics = AnalyticsService(Emitter(home / "spool"))
    return lambda: analytics.emit_event(
        event_type="memory_posted", user_id=USER, family_unit_id=FAMILY, session_id=SESSION, metadata=METADATA
    )


def spool_many_users(home: Path) -> Call:
    """Return `spool_event` with a different user for each event."""
    from itertools import cycle

    from spool import Emitter

    emitter = Emitter(home / "spool")
    users = cycle([(uuid.uuid4(), uuid.uuid4(), uuid.uuid4()) for _ in range(100)])

    def call() -> object:
        user, family, session = next(users)
        return emitter.emit_event(
            event_type="memory_posted", user_id=user, family_unit_id=family, session_id=session,
            metadata=METADATA,
        )  # fmt: skip

    return call


def spool_bound(home: Path) -> Call:
    """Return `spool_event` with the ids, a role and a request id from the context; see `new_scope`."""
    from spool import Emitter

    emitter = Emitter(home / "spool")
    return lambda: emitter.emit_event(event_type="memory_posted", metadata=METADATA)


_calls = itertools.count()


def new_scope() -> None:
    """Begin a scope for every second call, as a request does that emits two events."""
    from spool import ids
    from spool.context import begin, update

    if (number := next(_calls)) % 2 == 0:
        begin(user_id=None, family_unit_id=None, request_id=ids.uuid7(number))
        update(user_id=USER, family_unit_id=FAMILY, session_id=SESSION, role="parent")


def spool_counter(home: Path) -> Call:
    from spool import Emitter

    emitter = Emitter(home / "spool")
    return lambda: emitter.increment_counter(metric_name="api_request_count", labels=LABELS)


def spool_timer(home: Path) -> Call:
    from spool import Emitter

    emitter = Emitter(home / "spool")
    return lambda: emitter.record_timer(
        metric_name="api_request_duration_ms", duration_ms=12.5, labels=LABELS
    )


def spool_lines(home: Path) -> int:
    from spool.segment import recover

    for file in home.rglob("*.open"):
        recover(file)
    return lines_in("*.ndjson")(home)


def stdlib_file(home: Path) -> Call:
    import logging.handlers

    from pythonjsonlogger.json import JsonFormatter

    handler = logging.handlers.RotatingFileHandler(home / "log.ndjson", maxBytes=64 << 20, backupCount=2)
    handler.setFormatter(JsonFormatter())
    logger = _logger("file", handler)
    return lambda: logger.info("memory_posted", extra={"event_id": str(uuid.uuid4()), **_FIELDS})


def stdlib_queue(home: Path) -> Call:
    import logging.handlers
    import queue

    from pythonjsonlogger.json import JsonFormatter

    handler = logging.FileHandler(home / "log.ndjson")
    handler.setFormatter(JsonFormatter())
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    logging.handlers.QueueListener(records, handler).start()
    logger = _logger("queue", logging.handlers.QueueHandler(records))
    return lambda: logger.info("memory_posted", extra={"event_id": str(uuid.uuid4()), **_FIELDS})


def _logger(name: str, handler: Any) -> Any:
    import logging

    logger = logging.getLogger(f"bench.{name}")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def structlog_file(home: Path) -> Call:
    import structlog

    logger = structlog.wrap_logger(
        structlog.BytesLogger((home / "structlog.ndjson").open("ab")),
        processors=[
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=True,
    )
    return lambda: logger.info("memory_posted", event_id=str(uuid.uuid4()), **_FIELDS)


def loguru_file(home: Path) -> Call:
    from loguru import logger

    logger.remove()
    logger.add(home / "loguru.ndjson", serialize=True, rotation="64 MB")
    return lambda: logger.bind(event_id=str(uuid.uuid4()), **_FIELDS).info("memory_posted")


def sqlite_wal(home: Path) -> Call:
    database = sqlite3.connect(home / "events.db", isolation_level=None, check_same_thread=False)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=normal")
    database.execute("create table events(line blob)")
    return lambda: database.execute("insert into events values(?)", (orjson.dumps(READY, None, _LINE),))


def persist_queue(home: Path) -> Call:
    import persistqueue

    queue = persistqueue.SQLiteQueue(str(home / "queue"), auto_commit=True, multithreading=True)
    return lambda: queue.put(orjson.dumps(READY, None, _LINE))


def prometheus(home: Path) -> Call:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(home)
    import prometheus_client

    counter = prometheus_client.Counter("api_request_count", "x", list(LABELS), registry=None)
    return lambda: counter.labels(**LABELS).inc()


def prometheus_total(home: Path) -> int:
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    kept = next(home.rglob("*.db")).parent
    multiprocess.MultiProcessCollector(registry, path=str(kept))
    return int(sum(sample.value for metric in registry.collect() for sample in metric.samples))


def otel_counter(home: Path) -> Call:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    reader = PeriodicExportingMetricReader(_to_file(home, "metrics"))
    counter = MeterProvider(metric_readers=[reader]).get_meter("bench").create_counter("api_request_count")
    return lambda: counter.add(1, LABELS)


def otel_log(home: Path) -> Call:
    import time

    from opentelemetry._logs import LogRecord
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    provider = LoggerProvider()
    provider.add_log_record_processor(BatchLogRecordProcessor(_to_file(home, "logs")))
    logger = provider.get_logger("bench")
    attributes: dict[str, Any] = {
        "user_id": str(USER),
        "family_unit_id": str(FAMILY),
        "memory_id": METADATA["memory_id"],
    }

    def call() -> object:
        named: dict[str, Any] = {"event_id": str(uuid.uuid4()), **attributes}
        return logger.emit(LogRecord(timestamp=time.time_ns(), body="memory_posted", attributes=named))

    return call


def _to_file(home: Path, kind: str) -> Any:
    """Return OpenTelemetry's own exporters, which write a line per record or metric."""
    stream = (home / f"{kind}.ndjson").open("w", buffering=1)
    if kind == "logs":
        from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter

        return ConsoleLogRecordExporter(out=stream, formatter=lambda log: log.to_json(indent=None) + "\n")
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    return ConsoleMetricExporter(out=stream, formatter=lambda data: data.to_json(indent=None) + "\n")


class _Collector(http.server.BaseHTTPRequestHandler):
    """Counts received records of JSON batches in a file, so that another process can read the count."""

    protocol_version = "HTTP/1.1"
    arrived: Path

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = zlib.decompress(body, 31)
        with self.arrived.open("a") as file:
            file.write("\n" * len(json.loads(body).get("batch", [])))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _collector(home: Path) -> str:
    """Start a collector in a process of its own; return its address."""
    handler = type("Collector", (_Collector,), {"arrived": home / "arrived.ndjson"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if os.fork() == 0:
        _end_with_parent()
        server.serve_forever()
    return f"http://127.0.0.1:{server.server_port}"


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            with suppress(InterruptedError):
                threading.Event().wait(2)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def posthog(home: Path) -> Call:
    from posthog import Posthog

    client = Posthog("key", host=_collector(home), max_queue_size=10**7)
    return lambda: client.capture("memory_posted", distinct_id=str(USER), properties=METADATA)


def segment(home: Path) -> Call:
    from segment.analytics.client import Client

    client = Client("key", host=_collector(home), max_queue_size=10**7)
    return lambda: client.track(str(USER), "memory_posted", METADATA)


def statsd_udp(home: Path) -> Call:
    import statsd

    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    if os.fork() == 0:
        _end_with_parent()
        with (home / "arrived.ndjson").open("ab", buffering=0) as file:
            while receiver.recv(512):
                file.write(b"\n")
    client = statsd.StatsClient("127.0.0.1", receiver.getsockname()[1])
    return lambda: client.incr("api_request_count")


FLOOR = Sink("orjson.dumps + os.write (floor)", floor, lines_in("floor.ndjson"))
OURS = (
    Sink("spool emit_event", spool_event, spool_lines),
    Sink("spool emit_event, 100 users", spool_many_users, spool_lines),
    Sink("spool emit_event, bound", spool_bound, spool_lines, prepare=new_scope),
    Sink("spool await emit_event", spool_awaited, spool_lines, awaited=True),
    Sink("spool increment_counter", spool_counter, spool_lines),
    Sink("spool record_timer", spool_timer, spool_lines),
)
PEERS = (
    Sink("logging RotatingFileHandler, JSON", stdlib_file, lines_in("log.ndjson*")),
    Sink("logging QueueHandler, JSON", stdlib_queue, lines_in("log.ndjson*")),
    Sink("structlog, orjson, BytesLogger", structlog_file, lines_in("structlog.ndjson")),
    Sink("loguru, serialize", loguru_file, lines_in("loguru*.ndjson")),
    Sink("SQLite WAL insert", sqlite_wal, rows_in("select count(*) from events")),
    Sink("persist-queue SQLiteQueue", persist_queue, rows_in("select count(*) from queue_default")),
    Sink("prometheus_client, multiprocess", prometheus, prometheus_total, events=False),
    Sink("OpenTelemetry counter", otel_counter, lines_in("metrics.ndjson"), events=False),
    Sink("OpenTelemetry log record, batch", otel_log, lines_in("logs.ndjson")),
    Sink("statsd UDP", statsd_udp, lines_in("arrived.ndjson"), events=False),
    Sink("PostHog capture", posthog, lines_in("arrived.ndjson")),
    Sink("Segment track", segment, lines_in("arrived.ndjson")),
)
