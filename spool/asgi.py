"""Request metrics, request ids and context for any ASGI application; no framework is imported.

    app.add_middleware(AnalyticsMiddleware, exclude=["/health"])      # FastAPI, Starlette
    app.asgi_app = AnalyticsMiddleware(app.asgi_app)                  # Quart
    app = AnalyticsMiddleware(app)                                    # Litestar, Django and any other

Each HTTP request is one `api_request_count`, one `api_request_duration_ms` (unless they are sampled: see
`request_timer_rate` in spool/settings.py) and, if it failed, one `api_request_error_count`, labelled endpoint,
method and status. Each WebSocket and excluded path has a scope and no metrics. The request's id is bound to the
context, so that every event of the request has it in its metadata, and is returned in the response.

The status is the one that was sent. Without a response it is 500, which servers send then; if the client went
away before the last byte it is 499.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from spool.context import begin_empty, end
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
    trace_id,
)
from spool.routes import Routed, Routes, routes_of, template_of
from spool.starlette_stack import put_outermost

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]
"""Of a scope, `receive` and `send`, for which each framework has types of its own."""

_HEADER: Final = b"x-request-id"
_LENGTH: Final = b"content-length"
_TRACEPARENT: Final = b"traceparent"
_PREFLIGHT: Final = (b"origin", b"access-control-request-method")


class AnalyticsMiddleware(Middleware[Application]):
    """Wraps an ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html).

    `emitter` is the process-wide one unless given. Requests to a path of `exclude`, a list, or below have no
    metrics; "/" is the root alone. `endpoint`, a function of the scope, returns a request's label, or None for
    the template of its route. Raises `ExcludeError`, a TypeError and ValueError, for what is not a list of paths.

    Added to Starlette or FastAPI it is put around all other middlewares, so that it sees what they answer.
    """

    _routes: Routes | None = None
    _routes_known = False
    _placed = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            self._emitter.prepare()  # again: this may be a worker that was forked in C
        app = self._app
        if not self._placed and "app" in scope and MARK not in scope:
            self._placed = True
            app = put_outermost(self, scope) or app
        if kind not in {"http", "websocket"} or MARK in scope or app is not self._app:
            await app(scope, receive, send)
        elif kind == "http":
            await self._http(scope, receive, send)
        else:
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Message, receive: Receive, send: Send) -> None:
        if not self._routes_known:
            self._routes, self._routes_known = routes_of(self._app, scope), True
        scope[MARK] = routed = Routed(scope)
        exchange = _Exchange(self._emitter, routed, receive, send, lambda: self._label(scope, routed))
        if self._exclude and self._excluded(scope.get("root_path", ""), scope["path"]):
            exchange.omit_metrics()
        begun = begin_empty(request_id=exchange.request_id, trace_id=trace_id(_header(scope, _TRACEPARENT)))
        begun.scope.request = scope["method"], scope["path"]
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except GeneratorExit:  # the event loop was closed: nobody answers, or waits
            exchange.abandon()
            raise
        except BaseException:
            exchange.fail()
            raise
        else:
            exchange.fail()  # if there was no last byte
        finally:
            routed.forget()
            end(begun)

    async def _websocket(self, scope: Message, receive: Receive, send: Send) -> None:
        scope[MARK] = None
        begun = begin_empty(
            request_id=request_id(_header(scope, _HEADER)), trace_id=trace_id(_header(scope, _TRACEPARENT))
        )
        try:
            await self._app(scope, receive, send)
        finally:
            end(begun)

    def _label(self, scope: Message, routed: Routed) -> str:
        if self._endpoint is not None and (label := given_endpoint(self._endpoint, routed.scope)) is not None:
            return label
        if scope["method"] == "OPTIONS" and all(_header(scope, name) is not None for name in _PREFLIGHT):
            return PREFLIGHT
        try:
            return template_of(self._routes, routed)
        except Exception as error:  # a release of a framework that keeps its routes in another way
            if is_foreign(error):
                raise
            return UNMATCHED


def _header(scope: Message, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


class _Exchange:
    """One request and its response on their way through."""

    def __init__(
        self, emitter: Emitter, routed: Routed, receive: Receive, send: Send, label: Callable[[], str]
    ) -> None:
        self.request_id = request_id(_header(routed.scope, _HEADER))
        self._routed = routed
        self._receive = receive
        self._send = send
        self._label = label
        self._timer = RequestTimer(emitter, routed.scope["method"])
        self._status: str | None = None
        self._has_trailers = False
        self._left = 0
        """Bytes of the body that the header Content-Length announced and that were not sent yet."""
        self._disconnected = False

    def omit_metrics(self) -> None:
        self._timer.ended = True

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._disconnected = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._routed.answered = True
            self._status = str(message["status"])
            self._has_trailers = message.get("trailers", False)
            message = {**message, "headers": self._headers(message.get("headers", ()))}
        try:
            await self._send(message)
        except OSError:  # since version 2.4 of the specification, if the client is gone
            self._disconnected = True
            raise
        if self._is_last(kind, message) and not self._timer.ended:
            self._end()

    def _headers(self, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        headers = [(_HEADER, self.request_id.encode())]
        for header in given:
            name = header[0].lower()
            if name == _LENGTH and header[1].isdigit():
                self._left = int(header[1])
            if name != _HEADER:
                headers.append(header)
        return headers

    def _is_last(self, kind: str, message: Message) -> bool:
        if kind == "http.response.body" and self._left:
            # With the last of the announced bytes the client may be gone before the application says that it is done.
            self._left -= len(message.get("body", b""))
            if self._left <= 0 and not self._has_trailers:
                return True
        if kind in {"http.response.body", "http.response.zerocopysend"}:
            return not self._has_trailers and not message.get("more_body", False)
        if kind == "http.response.trailers":
            return not message.get("more_trailers", False)
        return bool(kind == "http.response.pathsend") and not self._has_trailers

    def fail(self) -> None:
        """The application raised, was cancelled or is done: without a last byte there will be none."""
        if not self._timer.ended:
            self._end(failed=not self._disconnected)

    def abandon(self) -> None:
        self._disconnected = True
        self.fail()

    def _end(self, *, failed: bool = False) -> None:
        status = DISCONNECTED if self._disconnected else self._status or FAILED
        self._timer.end(self._label(), status, failed=failed)
