"""Request metrics, request ids and context for any WSGI application; no framework is imported.

    app.wsgi_app = AnalyticsMiddleware(app.wsgi_app)                  # Flask, or spool.flask
    application = AnalyticsMiddleware(get_wsgi_application())         # Django, or spool.django

The metrics and labels are those of spool/asgi.py. The server sees the same response as without the
middleware: its own file wrapper, which it sends by sendfile(2), and the number of pieces, because it computes
the Content-Length of a single piece.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Final

from spool.context import begin_empty
from spool.emitter import Emitter
from spool.interruption import is_foreign
from spool.request import (
    DISCONNECTED,
    FAILED,
    MARK,
    PREFLIGHT,
    UNMATCHED,
    Middleware,
    RequestTimer,
    given_endpoint,
    request_id,
    served_request,
    trace_id,
)
from spool.routes import Routed, Routes, routes_of_wsgi, template_of
from spool.wsgi_input import watched

Environment = dict[str, Any]
Application = Callable[[Environment, Callable[..., Any]], Iterable[bytes]]

_WITHOUT_BODY: Final = frozenset({"204", "304"})
_PREFLIGHT: Final = ("HTTP_ORIGIN", "HTTP_ACCESS_CONTROL_REQUEST_METHOD")


class AnalyticsMiddleware(Middleware[Application]):
    """Wraps a WSGI application (PEP 3333).

    `emitter` defaults to the process-wide one. Requests to the paths in the list `exclude`, or below them,
    have no metrics; "/" excludes only the root. `endpoint`, a function of the environment, returns a
    request's label, or None to use the template of its route. Raises `ExcludeError`, a TypeError and
    ValueError, if `exclude` is not a list of paths.
    """

    _routes: Routes | None = None
    _routes_known = False

    def __call__(self, environ: Environment, start_response: Callable[..., Any]) -> Iterable[bytes]:
        root, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
        served = served_request()
        if MARK in environ or (served is not None and served == _request(environ, root + path)):
            return self._app(environ, start_response)
        if not self._routes_known:
            self._routes, self._routes_known = routes_of_wsgi(self._app), True
        environ[MARK] = routed = Routed(environ)
        # The response is produced piece by piece after this returns, in the same context.
        context = contextvars.copy_context()
        exchange = _Exchange(
            self._emitter, environ, start_response, context, lambda: self._label(environ, routed)
        )
        if self._exclude and self._excluded(root, root + path):
            exchange.omit_metrics()
        return exchange.begin(self._app)

    def _label(self, environ: Environment, routed: Routed) -> str:
        if self._endpoint is not None and (label := given_endpoint(self._endpoint, environ)) is not None:
            return label
        if environ.get("REQUEST_METHOD") == "OPTIONS" and all(name in environ for name in _PREFLIGHT):
            return PREFLIGHT
        try:
            return template_of(self._routes, routed)
        except Exception as error:  # a framework release that stores its routes differently
            if is_foreign(error):
                raise
            return UNMATCHED


def _request(environ: Environment, path: str) -> tuple[str, str]:
    """Return method and path as in ASGI; WSGI represents the bytes of the path as characters."""
    return environ.get("REQUEST_METHOD", ""), path.encode("latin-1", "replace").decode(errors="replace")


class _Exchange:
    """One request and its response."""

    def __init__(
        self,
        emitter: Emitter,
        environ: Environment,
        start_response: Callable[..., Any],
        context: contextvars.Context,
        label: Callable[[], str],
    ) -> None:
        self._environ = environ
        self._start_response = start_response
        self._context = context
        self._label = label
        self._request_id = request_id(environ.get("HTTP_X_REQUEST_ID"))
        self._timer = RequestTimer(emitter, environ.get("REQUEST_METHOD", ""))
        self._status: str | None = None
        self._endpoint: str | None = None
        self._input = watched(environ.get("wsgi.input"), environ)
        if self._input is not None:
            environ["wsgi.input"] = self._input
        self.begun = False
        """Whether bytes of the body, and with them the status, were sent."""
        self.length: int | None = None
        """The length of the body, if the header Content-Length announces it."""

    def omit_metrics(self) -> None:
        self._timer.ended = True

    def begin(self, app: Application) -> Iterable[bytes]:
        """Call the application and return the response in the form that the server must see."""
        trace = trace_id(self._environ.get("HTTP_TRACEPARENT"))
        self._context.run(begin_empty, request_id=self._request_id, trace_id=trace)
        try:
            pieces = self._context.run(app, self._environ, self._start)
            if self._is_servers_own(pieces):
                self._end_when_closed(pieces)
                return pieces
            response = _SizedResponse if isinstance(pieces, Sized) else _Response
            return response(self, pieces)
        except BaseException:
            self.end(failed=True)
            raise

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the context of the request."""
        return self._context.run(function, *arguments)

    def end(self, *, disconnected: bool = False, failed: bool = False) -> None:
        if not self._timer.ended:
            status = self._status or FAILED
            if self._input is not None and self._input.is_cut_off():
                status, failed = DISCONNECTED, False
            elif disconnected and not self._has_no_body(status):
                status = DISCONNECTED
            elif failed and not self.begun:
                status = FAILED  # instead of the application's status
            self._timer.end(self._endpoint or self.run(self._label), status, failed=failed)
        self._environ.pop(MARK, None)

    def _start(self, status: str, headers: list[tuple[str, str]], *exc_info: Any) -> Any:
        kept = [("X-Request-ID", self._request_id)]
        for header in headers:
            name = header[0].lower()
            if name == "content-length" and header[1].isdigit():
                self.length = int(header[1])
            if name != "x-request-id":
                kept.append(header)
        write = self._start_response(status, kept, *exc_info)
        self._status = status[:3]
        if (
            not self._timer.ended
        ):  # the framework's data about the request exists now, but maybe not at the end
            self._endpoint = self._label()

        def writing(data: bytes) -> None:
            self.begun = True
            write(data)

        return writing if callable(write) else write

    def _has_no_body(self, status: str) -> bool:
        """Whether a server may close the response without reading its pieces."""
        return self._environ.get("REQUEST_METHOD") == "HEAD" or status in _WITHOUT_BODY

    def _is_servers_own(self, pieces: object) -> bool:
        """Whether the server's file wrapper made the response. uWSGI's is a function that returns the file."""
        wrapper = self._environ.get("wsgi.file_wrapper")
        if isinstance(wrapper, type):
            return isinstance(pieces, wrapper)
        return wrapper is not None and hasattr(pieces, "read")

    def _end_when_closed(self, pieces: Any) -> None:
        close = getattr(pieces, "close", None)

        def closed() -> None:
            try:
                if close is not None:
                    self.run(close)
            finally:
                self.end()

        try:
            pieces.close = closed
        except AttributeError:  # a type without settable attributes: the server sends it after this call
            self.end()


class _Response:
    """The pieces of a response, iterated and closed by the server."""

    def __init__(self, exchange: _Exchange, pieces: Iterable[bytes]) -> None:
        self._exchange = exchange
        self._pieces = pieces
        self._taken = 0
        self._bytes = 0
        self._rest: Iterator[bytes] = exchange.run(iter, pieces)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece: bytes = self._exchange.run(next, self._rest)
        except StopIteration:
            self._exchange.end()
            raise
        except BaseException:
            self._exchange.end(failed=True)
            raise
        if piece:
            self._exchange.begun = True
            self._bytes += len(piece)
        self._taken += 1
        return piece

    def close(self) -> None:
        """End the exchange. The server calls this at the end, even if the client has disconnected."""
        try:
            close = getattr(self._pieces, "close", None)
            if close is not None:
                self._exchange.run(close)
        finally:
            self._exchange.end(disconnected=not self._is_complete())

    def _is_complete(self) -> bool:
        """Whether the server has read the whole body, although it did not ask for a further piece."""
        length = self._exchange.length
        return length is not None and self._bytes >= length


class _SizedResponse(_Response):
    """A response with a known number of pieces, such as a list."""

    def __len__(self) -> int:
        return len(self._pieces)  # type: ignore[arg-type]  # by isinstance

    def _is_complete(self) -> bool:
        return self._taken >= len(self) or super()._is_complete()
