"""Code shared by the request middlewares: the id of a request, its labels, and its metrics."""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Generic, TypeVar

from spool import fork, ids
from spool.context import in_force
from spool.emitter import Emitter, get_emitter
from spool.interruption import is_foreign
from spool.log import Warnings
from spool.metric_names import REQUEST_COUNT, REQUEST_DURATION, REQUEST_ERRORS

Application = TypeVar("Application")

UNMATCHED: Final = "unmatched"
"""Label of a request that no route matched: its path is arbitrary text from the client."""
MIDDLEWARE: Final = "middleware"
"""Label of a request that a middleware answered before it reached the router."""
PREFLIGHT: Final = "preflight"
"""Label of a CORS preflight (https://fetch.spec.whatwg.org/#cors-preflight-request), whatever its path."""
DISCONNECTED: Final = "499"
"""Status of a request whose client disconnected before the last byte, as in nginx's log."""
FAILED: Final = "500"
"""Status of a request that ended without a response: servers then send this status."""
MARK: Final = "spool.request"
"""Key that marks an ASGI scope or WSGI environment as already served by an outer middleware."""

SAMPLE_RATE: Final = "sample_rate"
"""Label of a request's timer with the sample rate, if only a part of the requests is timed."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_VALID_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_INNER: Final = ("app", "application", "asgi_app", "wsgi_app", "wsgi_application", "_app", "__self__")
"""Attributes in which middlewares and bound methods keep the application that they wrap."""
_DEEPEST: Final = 30


def path_below(root: str, path: str) -> str:
    """Return the path without the prefix at which a proxy or a router has mounted the application."""
    root = root.rstrip("/")
    return path.removeprefix(root) or "/" if root and f"{path}/".startswith(f"{root}/") else path


class ExcludeError(TypeError, ValueError):
    """`exclude` is not a list of paths."""


def request_id(given: str | None) -> str:
    """Return the request id sent by a proxy or client if it is valid, otherwise a new UUIDv7."""
    if given is not None and _VALID_ID.fullmatch(given):
        return given
    return ids.uuid7(time.time_ns() // 1_000_000)


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id of OpenTelemetry's current span, or of a `traceparent` header, or None.

    32 hex digits (https://www.w3.org/TR/trace-context/#trace-id). OpenTelemetry is used only if the
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


def inner_of(app: object) -> Iterator[Any]:
    """Yield an application and the applications inside its middlewares, as far as they expose them."""
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield app
        app = next((inner for name in _INNER if (inner := getattr(app, name, None)) is not None), None)


def wrapped_with(app: object, attribute: str) -> Any:
    """Return the application, or the first one inside it, that has the attribute, or None."""
    return next((each for each in inner_of(app) if hasattr(each, attribute)), None)


def served_request() -> tuple[str, str] | None:
    """Return method and path of the request that an ASGI middleware is serving here, or None.

    A WSGI application mounted inside it sees the same request, in an environment without a mark.
    """
    scope = in_force()
    return None if scope is None else scope.request


class Exclusions:
    """The excluded paths, including what is below them; `/` is only the root."""

    def __init__(self, paths: Iterable[str]) -> None:
        if not isinstance(paths, (list, tuple, set, frozenset)):
            raise ExcludeError(
                f'exclude must be a list of paths such as ["/health"], not {type(paths).__name__} {paths!r}'
            )
        for path in paths:
            if not isinstance(path, str) or not path.startswith("/"):
                raise ExcludeError(f'path in exclude must be text that begins with "/", not {path!r}')
        self._exact = frozenset(path.rstrip("/") or "/" for path in paths)
        self._below = tuple(f"{path}/" for path in self._exact if path != "/")

    def __contains__(self, path: str) -> bool:
        return (path.rstrip("/") or "/") in self._exact or path.startswith(self._below)

    def __bool__(self) -> bool:
        return bool(self._exact)


class Middleware(Generic[Application]):
    """The base of both middlewares: the inner application, the emitter and the excluded paths.

    The emitter is prepared here, when the server starts, so that no request pays for it.
    """

    def __init__(
        self,
        app: Application,
        *,
        emitter: Emitter | None = None,
        exclude: Iterable[str] = (),
        endpoint: Callable[[Any], str | None] | None = None,
    ) -> None:
        if endpoint is not None and not callable(endpoint):
            raise TypeError(f"endpoint must be a function of a request, not {type(endpoint).__name__}")
        self._app = app
        self._emitter = emitter or get_emitter()
        self._exclude = Exclusions(exclude)
        self._endpoint = endpoint
        self._emitter.prepare()

    def _excluded(self, root: str, path: str) -> bool:
        """Whether a path is excluded, either as requested or without the prefix of a mount."""
        return path in self._exclude or path_below(root, path) in self._exclude


_warnings: Final = Warnings()


def given_endpoint(endpoint: Callable[[Any], str | None], request: Any) -> str | None:
    """Return the label that the application's own function returns for a request, or None."""
    try:
        label = endpoint(request)
        if label is None or type(label) is str:
            return label
        problem = f"returned {type(label).__name__}, not text"
    except Exception as error:
        if is_foreign(error):
            raise
        problem = f"raised {type(error).__name__}: {error}"
    _warnings.log('the function "endpoint" of the middleware %s: the route\'s template is used', problem)
    return None


@contextmanager
def calling_user_function(emitter: Emitter) -> Iterator[None]:
    """Run a block that calls the application's own function for a request's user and binds the result.

    With `strict` its exceptions are raised; otherwise they are logged, and the request has no user.
    """
    try:
        yield
    except Exception as error:
        if is_foreign(error) or emitter.settings.strict:
            raise
        _warnings.log('the function "user" raised %s: %s; events have no user', type(error).__name__, error)


class RequestTimer:
    """Times one request and records its metrics, once."""

    def __init__(self, emitter: Emitter, method: str) -> None:
        self._emitter = emitter
        self._method = method if method in _METHODS else "OTHER"
        self._begin = time.perf_counter_ns()
        self.ended = False

    def end(self, endpoint: str, status: str, *, failed: bool = False) -> None:
        """Record the end of the response. `failed`: the application aborted the response."""
        if self.ended:
            return
        self.ended = True
        milliseconds = (time.perf_counter_ns() - self._begin) / 1_000_000
        labels = {"endpoint": endpoint, "method": self._method, "status": status}
        self._emitter.increment_counter(metric_name=REQUEST_COUNT, labels=labels)
        self._record_duration(milliseconds, labels)
        if failed or status >= "500":
            self._emitter.increment_counter(metric_name=REQUEST_ERRORS, labels=labels)

    def _record_duration(self, milliseconds: float, labels: dict[str, str]) -> None:
        """Record the timer; with `request_timer_rate` only for that part of the requests.

        Each request is drawn by itself: of a client that alternates between a fast and a slow request, one in
        every n could be the slow ones alone.
        """
        rate = self._emitter.settings.request_timer_rate
        if rate == 1:
            self._emitter.record_timer(metric_name=REQUEST_DURATION, duration_ms=milliseconds, labels=labels)
        elif _draw() < rate:
            self._emitter.record_timer(
                metric_name=REQUEST_DURATION, duration_ms=milliseconds, labels={**labels, SAMPLE_RATE: rate}
            )


_generator: Final = random.Random()
"""Used only by this module: the application may seed the global generator, even for each request."""
_draw: Final = _generator.random
fork.in_child(_generator.seed)  # otherwise all workers would sample the same of their first, slow requests
