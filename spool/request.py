"""What the request middlewares share: the id of a request, its labels, and the metrics when it has ended."""

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
"""Label of a request that no route matched: its path is whatever a client asked for."""
MIDDLEWARE: Final = "middleware"
"""Label of a request that a middleware answered before it reached the router."""
PREFLIGHT: Final = "preflight"
"""Label of a CORS preflight (https://fetch.spec.whatwg.org/#cors-preflight-request), whatever its path."""
DISCONNECTED: Final = "499"
"""Status of a request whose client went away before the last byte, as nginx logs it."""
FAILED: Final = "500"
"""Status of a request that ended without a response: every server answers it so."""
MARK: Final = "spool.request"
"""Key of an ASGI scope or a WSGI environment that a middleware serves already, so that an inner one does not."""

SAMPLE_RATE: Final = "sample_rate"
"""Label of a request's timer if only a part of the requests has one: that part."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
_VALID_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
_INNER: Final = ("app", "application", "asgi_app", "wsgi_app", "wsgi_application", "_app", "__self__")
"""Attributes in which middlewares and bound methods keep the application that they wrap."""
_DEEPEST: Final = 30


def path_below(root: str, path: str) -> str:
    """Return the path as the application's routes have it, without where a proxy or a router has mounted it."""
    root = root.rstrip("/")
    return path.removeprefix(root) or "/" if root and f"{path}/".startswith(f"{root}/") else path


class ExcludeError(TypeError, ValueError):
    """`exclude` is not a list of paths."""


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


def inner_of(app: object) -> Iterator[Any]:
    """Yield an application and what is inside of it, as far as its middlewares show it."""
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield app
        app = next((inner for name in _INNER if (inner := getattr(app, name, None)) is not None), None)


def wrapped_with(app: object, attribute: str) -> Any:
    """Return what has an attribute of an application and those inside of it, None if none has."""
    return next((each for each in inner_of(app) if hasattr(each, attribute)), None)


def served_request() -> tuple[str, str] | None:
    """Return method and path of the request that an ASGI middleware serves here, None if none does.

    Within it, a WSGI application that is mounted sees the same request, in an environment that has no mark.
    """
    scope = in_force()
    return None if scope is None else scope.request


class Exclusions:
    """The paths that are left alone, each with what is below it; `/` is the root alone."""

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
    """What both have: the application inside, the emitter, and the paths that are left alone.

    The emitter is prepared here, at the start of the server, so that no request pays for it.
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
        """Whether a path is excluded, as the client asked for it or as the application's routes have it."""
        return path in self._exclude or path_below(root, path) in self._exclude


_warnings: Final = Warnings()


def given_endpoint(endpoint: Callable[[Any], str | None], request: Any) -> str | None:
    """Return the label that the application's own function gives a request, None if it gives none."""
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
    """Run a block that asks the application's own function for a request's user, and binds it.

    What it raises is raised with `strict`; else it is logged, and the request is nobody's.
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
        """The last byte was sent, or will never be; `failed` if the application broke a response off."""
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
        """Record the timer, or with `request_timer_rate` only for that part of the requests.

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
"""Of this module alone: the application may seed the global one, for each request even."""
_draw: Final = _generator.random
fork.in_child(_generator.seed)  # else the first requests of all workers, the slow ones, are drawn alike
