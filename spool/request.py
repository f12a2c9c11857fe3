"""What the two middlewares share: the id of a request, its labels, and the metrics when it has ended."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, Generic, TypeVar

from spool import ids
from spool.emitter import Emitter, get_emitter
from spool.metric_names import REQUEST_COUNT, REQUEST_DURATION, REQUEST_ERRORS

Application = TypeVar("Application")

UNMATCHED: Final = "unmatched"
"""Label of a request that no route matched: its path is whatever a client asked for."""
DISCONNECTED: Final = "499"
"""Status of a request whose client went away before the last byte, as nginx logs it."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_VALID_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def request_id(given: str | None) -> str:
    """Return the id that a proxy or client gave if it is sane, else a new UUIDv7."""
    if given is not None and _VALID_ID.fullmatch(given):
        return given
    return ids.uuid7(time.time_ns() // 1_000_000)


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id of OpenTelemetry's current span, else that of a `traceparent` header, else None.

    32 hex digits (https://www.w3.org/TR/trace-context/#trace-id). OpenTelemetry is asked only if the
    application has imported it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        with suppress(Exception):
            context = trace.get_current_span().get_span_context()
            if context.is_valid:
                return f"{context.trace_id:032x}"
    if traceparent is None or (match := _TRACEPARENT.fullmatch(traceparent.strip())) is None:
        return None
    version, identifier, more = match.groups()
    return None if version == "00" and more else identifier


class Middleware(Generic[Application]):
    """What both have: the application inside, the emitter, and the paths that are left alone.

    The emitter is prepared here, at the start of the server, so that no request pays for it.
    """

    def __init__(
        self, app: Application, *, emitter: Emitter | None = None, exclude: Iterable[str] = ()
    ) -> None:
        self._app = app
        self._emitter = emitter or get_emitter()
        self._exclude = tuple(exclude)
        self._emitter.prepare()

    def _excluded(self, path: str) -> bool:
        """Whether a path is one of the excluded ones, or below one."""
        return any(path == each or path.startswith(each.rstrip("/") + "/") for each in self._exclude)


class RequestTimer:
    """Times one request and records its metrics, once."""

    def __init__(self, emitter: Emitter, method: str) -> None:
        self._emitter = emitter
        self._method = method if method in _METHODS else "OTHER"
        self._begin = time.perf_counter_ns()
        self.ended = False

    def end(self, endpoint: str, status: str) -> None:
        """The last byte was sent, or will never be."""
        if self.ended:
            return
        self.ended = True
        milliseconds = (time.perf_counter_ns() - self._begin) / 1_000_000
        labels = {"endpoint": endpoint, "method": self._method, "status": status}
        self._emitter.increment_counter(metric_name=REQUEST_COUNT, labels=labels)
        self._emitter.record_timer(metric_name=REQUEST_DURATION, duration_ms=milliseconds, labels=labels)
        if status >= "500":
            self._emitter.increment_counter(metric_name=REQUEST_ERRORS, labels=labels)
