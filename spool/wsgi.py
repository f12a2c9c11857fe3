"""Request metrics, request ids and context for any WSGI application; no framework is imported.

    app.wsgi_app = AnalyticsMiddleware(app.wsgi_app)                  # Flask
    application = AnalyticsMiddleware(get_wsgi_application())         # Django

The same metrics and labels as spool/asgi.py. The route's template is what Flask leaves in the environment, or
what Django, if it is loaded, resolves the path to.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from spool.context import begin_empty
from spool.emitter import Emitter
from spool.interruption import is_foreign
from spool.request import DISCONNECTED, UNMATCHED, Middleware, RequestTimer, request_id, trace_id

Environment = dict[str, Any]
Application = Callable[[Environment, Callable[..., Any]], Iterable[bytes]]


class AnalyticsMiddleware(Middleware[Application]):
    """Wraps a WSGI application (PEP 3333).

    `emitter` is the process-wide one unless given; requests to a path of `exclude`, or below, have no metrics.
    """

    def __call__(self, environ: Environment, start_response: Callable[..., Any]) -> Iterable[bytes]:
        # The response is made piece by piece after this returned, in the same context.
        context = contextvars.copy_context()
        exchange = _Exchange(self._emitter, environ, start_response, context)
        if self._excluded(environ.get("PATH_INFO", "")):
            exchange.omit_metrics()
        return exchange.begin(self._app)


class _Exchange:
    """One request and its response, iterated and closed by the server."""

    def __init__(
        self,
        emitter: Emitter,
        environ: Environment,
        start_response: Callable[..., Any],
        context: contextvars.Context,
    ) -> None:
        self._environ = environ
        self._start_response = start_response
        self._context = context
        self._request_id = request_id(environ.get("HTTP_X_REQUEST_ID"))
        self._timer = RequestTimer(emitter, environ.get("REQUEST_METHOD", ""))
        self._status = "500"
        self._template: str | None = None
        self._app: Application | None = None
        self._pieces: Iterable[bytes] = ()
        self._rest: Iterator[bytes] = iter(())

    def omit_metrics(self) -> None:
        self._timer.ended = True

    def begin(self, app: Application) -> _Exchange:
        trace = trace_id(self._environ.get("HTTP_TRACEPARENT"))
        self._context.run(begin_empty, request_id=self._request_id, trace_id=trace)
        self._app = app
        try:
            self._pieces = self._context.run(app, self._environ, self._start)
            self._rest = iter(self._pieces)
        except Exception:
            self._fail()
            raise
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return self._context.run(next, self._rest)
        except StopIteration:
            self._timer.end(self._endpoint(), self._status)
            raise
        except Exception:
            self._fail()
            raise

    def close(self) -> None:
        """What the server calls in the end, also if the client went away before it."""
        try:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                self._context.run(close)
        finally:
            self._timer.end(self._endpoint(), DISCONNECTED)

    def _start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        self._status = status[:3]
        self._template = _flask_template(self._environ)
        kept = [header for header in headers if header[0].lower() != "x-request-id"]
        return self._start_response(status, [*kept, ("X-Request-ID", self._request_id)], *exc_info)

    def _fail(self) -> None:
        self._timer.end(self._endpoint(), "500")

    def _endpoint(self) -> str:
        try:
            return self._template or self._context.run(_resolve, self._app, self._environ)
        except Exception as error:  # no such path, or a framework that keeps its routes in another way
            if is_foreign(error):
                raise
            return UNMATCHED


def _flask_template(environ: Environment) -> str | None:
    """What Flask matched, as long as its request is under way."""
    rule = getattr(environ.get("werkzeug.request"), "url_rule", None)
    return None if rule is None else str(rule.rule)


def _resolve(app: Application | None, environ: Environment) -> str:
    """Ask the framework for the template of a path: Flask for one that raised, Django for any."""
    rules = getattr(getattr(app, "__self__", None), "url_map", None)
    if rules is not None:
        rule, _ = rules.bind_to_environ(environ).match(return_rule=True)
        return str(rule.rule)
    django = sys.modules.get("django.urls")
    if django is not None:
        return "/" + str(django.resolve(environ.get("PATH_INFO", "/")).route).lstrip("/")
    return UNMATCHED
