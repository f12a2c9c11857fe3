"""Request metrics, request ids and context for any ASGI application; no framework is imported.

    app.add_middleware(AnalyticsMiddleware, exclude=("/health",))

Each HTTP request is one `api_request_count`, one `api_request_duration_ms` and, if it failed, one
`api_request_error_count`, labelled endpoint, method and status. Each WebSocket and excluded path has a scope
and no metrics. The
request's id is bound to the context, so that every event of the request has it in its metadata, and is
returned in the response.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any, Final

from spool.context import begin_empty, end
from spool.emitter import Emitter
from spool.interruption import is_foreign
from spool.request import DISCONNECTED, UNMATCHED, Middleware, RequestTimer, request_id, trace_id

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

_HEADER: Final = b"x-request-id"
_TRACEPARENT: Final = b"traceparent"
_LONGEST_ROUTE: Final = 1024
_CONVERTER: Final = re.compile(r"\{(\w+):\w+\}")


class AnalyticsMiddleware(Middleware[Application]):
    """Wraps an ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html).

    `emitter` is the process-wide one unless given; requests to a path of `exclude`, or below, have no metrics.
    """

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._emitter.prepare()  # again: this may be a worker that was forked in C
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        identifier = request_id(_header(scope, _HEADER))
        trace = trace_id(_header(scope, _TRACEPARENT))
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send, identifier, trace)
            return
        exchange = _Exchange(self._emitter, scope, receive, send, identifier)
        if self._excluded(scope["path"]):
            exchange.omit_metrics()
        begun = begin_empty(request_id=exchange.request_id, trace_id=trace)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            exchange.fail()
            raise
        finally:
            exchange.abandon()
            end(begun)

    async def _websocket(
        self, scope: Message, receive: Receive, send: Send, identifier: str, trace: str | None
    ) -> None:
        begun = begin_empty(request_id=identifier, trace_id=trace)
        try:
            await self._app(scope, receive, send)
        finally:
            end(begun)


def _header(scope: Message, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)


class _Exchange:
    """One request and its response on their way through."""

    def __init__(
        self, emitter: Emitter, scope: Message, receive: Receive, send: Send, request_id: str
    ) -> None:
        self.request_id = request_id
        self._scope = scope
        self._path = scope["path"]  # a mount may change the scope's
        self._receive = receive
        self._send = send
        self._timer = RequestTimer(emitter, scope["method"])
        self._status = "500"
        self._disconnected = False

    def omit_metrics(self) -> None:
        self._timer.ended = True

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = str(message["status"])
            headers = [header for header in message.get("headers", ()) if header[0].lower() != _HEADER]
            message = {**message, "headers": [*headers, (_HEADER, self.request_id.encode())]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._timer.end(self._endpoint(), self._status)

    def fail(self) -> None:
        """The application raised: whoever is outside answers with 500, unless the client is gone."""
        self._timer.end(self._endpoint(), DISCONNECTED if self._disconnected else "500")

    def abandon(self) -> None:
        """The application is done, or was cancelled; without a last byte nobody waits for one any more."""
        self._timer.end(self._endpoint(), DISCONNECTED)

    def _endpoint(self) -> str:
        try:
            return template(self._scope, self._path)
        except Exception as error:  # a framework that keeps its routes in another way
            if is_foreign(error):
                raise
            return UNMATCHED


def template(scope: Message, path: str) -> str:
    """Return the template of the route that a request was given to, with those of the routers around it.

    Starlette leaves the innermost route in the scope, whose path is relative to where its router is mounted
    or included; what stands before it in the request's path becomes a template with the path's parameters.
    """
    route = _without_converters(getattr(scope.get("route"), "path", UNMATCHED))
    values = scope.get("path_params", {})
    actual = route.format_map(values)
    if path == actual or not path.endswith(actual):
        return route
    around = path[: len(path) - len(actual)]
    outer = {str(value): name for name, value in values.items() if f"{{{name}}}" not in route}
    parts = [f"{{{outer[part]}}}" if part in outer else part for part in around.split("/")]
    return "/".join(parts) + route


def _without_converters(route: str) -> str:
    """A route's path without the converters of its parameters (`{id:int}`)."""
    # A longer one is not kept: a router that takes the client's path for its route would fill the memory.
    return _remembered(route) if len(route) <= _LONGEST_ROUTE else _CONVERTER.sub(r"{\1}", route)


@lru_cache(maxsize=1024)
def _remembered(route: str) -> str:
    return _CONVERTER.sub(r"{\1}", route)
