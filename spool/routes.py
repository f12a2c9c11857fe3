"""The template of the route that served a request, taken from the framework, never from the client's path.

The framework is detected at the first request, by unwrapping the middlewares around the application:

    Starlette, FastAPI      the endpoint in the scope, looked up in the table of routes (spool/starlette_routes.py)
    Litestar                `path_template` in the scope
    Django, Flask, Quart    the request object, which a subclass of their request class stores in the mark

The mark (`MARK` in the scope or environment) is shared by all copies of a scope that middlewares make.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final, Protocol

from spool.interruption import is_foreign
from spool.request import MARK, MIDDLEWARE, UNMATCHED, path_below, wrapped_with

_RECORDS: Final = "_analytics_spool_records"


class Routed:
    """The routing state of a request: its original path, and what its router or framework recorded."""

    __slots__ = ("answered", "arrived", "mounted_at", "path", "request", "scope")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self.scope = scope
        self.arrived: Any = scope.get("endpoint")
        """The endpoint chosen by a router outside the middleware."""
        self.answered = False
        self.path: str | None = None
        """The path that the router received, or None if the request did not reach it."""
        self.mounted_at = _mounted_at(scope)
        self.request: Any = None
        """The framework's own request object."""

    def forget(self) -> None:
        """Break the reference cycle of scope and mark, which only the garbage collector would free."""
        self.scope = {}
        self.request = None


def _mounted_at(scope: MutableMapping[str, Any]) -> str:
    """Return the path at which the middleware's application is mounted, or "" if it has parameters."""
    if "SCRIPT_NAME" in scope:
        return str(scope["SCRIPT_NAME"])
    if "app_root_path" not in scope or scope.get("path_params"):
        return ""
    return str(scope.get("root_path", "")).removeprefix(scope["app_root_path"])


class Routes(Protocol):
    """The routes of an application."""

    def template(self, routed: Routed, /) -> str:
        """Return the label of a request."""


def routes_of(app: object, scope: MutableMapping[str, Any]) -> Routes | None:
    """Return the routes of an ASGI application, or of the application in the scope that contains the middleware."""
    try:
        host = wrapped_with(app, "url_path_for") or wrapped_with(scope.get("app"), "url_path_for")
        if host is not None:
            from spool.starlette_routes import StarletteRoutes

            return StarletteRoutes(host)
        if (host := wrapped_with(app, "asgi_router")) is not None:
            watch(host, "asgi_handler")
            return _Litestar()
        return _Litestar() if "path_template" in scope else _of_request_class(app)
    except Exception as error:  # a framework release that stores its routes differently
        if is_foreign(error):
            raise
        return None


def routes_of_wsgi(app: object) -> Routes | None:
    """Return the routes of a WSGI application."""
    try:
        return _of_request_class(app)
    except Exception as error:
        if is_foreign(error):
            raise
        return None


def _of_request_class(app: object) -> Routes | None:
    if wrapped_with(app, "resolve_request") is not None:
        return _Django(app)
    if (host := wrapped_with(app, "url_map")) is not None:
        return _Werkzeug(host)
    return None


def watch(host: Any, attribute: str) -> None:
    """Make an inner application record in the mark that a request reached it, and with which scope."""
    app = getattr(host, attribute, None)
    if app is not None and type(app) is not _Watched:
        setattr(host, attribute, _Watched(app))


class _Watched:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        mark = scope.get(MARK)
        if mark is not None:
            mark.scope = scope  # the scope of the innermost router: a middleware may have copied it
            if mark.path is None:
                mark.path = path_below(scope.get("root_path", ""), scope["path"])
        await self.app(scope, receive, send)


def template_of(routes: Routes | None, routed: Routed) -> str:
    """Return the label of a request. An inner `spool.django` stores its request even without a detected framework."""
    if routes is not None:
        return routes.template(routed)
    return UNMATCHED if routed.request is None else django_template(routed.request)


class _Litestar:
    def template(self, routed: Routed) -> str:
        scope = routed.scope
        if "path_params" not in scope:  # the router sets them before it looks for a route
            return MIDDLEWARE
        from spool.starlette_routes import without_converters

        template = scope.get("path_template")
        return UNMATCHED if template is None else without_converters(template) or "/"


class _Django:
    def __init__(self, app: Any) -> None:
        while (handler := wrapped_with(app, "resolve_request")) is not None:
            record_requests(handler)
            app = getattr(handler, "application", None)  # an application that serves static files itself

    def template(self, routed: Routed) -> str:
        if (
            routed.request is None and not routed.answered
        ):  # the client disconnected before Django created a request
            from django.urls import resolve

            scope = routed.scope
            path = (
                path_below(scope.get("root_path", ""), scope["path"])
                if "path" in scope
                else scope["PATH_INFO"]
            )
            return _django_route(resolve(path))
        return MIDDLEWARE if routed.request is None else django_template(routed.request)


def _django_route(match: Any) -> str:
    return "/" + str(match.route).lstrip("/")


def django_template(request: Any) -> str:
    """Return the route that Django resolved for a request, or the label for a request without one."""
    if (match := request.resolver_match) is not None:
        return _django_route(match)
    from django.urls import Resolver404, resolve

    try:
        resolve(request.path_info, getattr(request, "urlconf", None))
    except Resolver404:
        return UNMATCHED
    return MIDDLEWARE


class _Werkzeug:
    """The routes of Flask and Quart."""

    def __init__(self, host: Any) -> None:
        self._host = host
        record_requests(host)

    def template(self, routed: Routed) -> str:
        # Requests in progress of an application that is mounted beside the host.
        request = routed.request or routed.scope.get("werkzeug.request")
        if request is None:
            return MIDDLEWARE
        rule = request.url_rule or self._of_another_method(request)
        if rule is None:
            return UNMATCHED
        mounted: str = routed.scope.get("SCRIPT_NAME", "")
        return mounted.removeprefix(routed.mounted_at) + str(rule.rule)

    def _of_another_method(self, request: Any) -> Any:
        methods = getattr(request.routing_exception, "valid_methods", None)
        if not methods:
            return None
        try:
            adapter = self._host.create_url_adapter(request)
            return adapter.match(method=next(iter(methods)), return_rule=True)[0]
        except Exception as error:
            if is_foreign(error):
                raise
            return None


def record_requests(host: Any) -> None:
    """Make a framework's request class store each request in the mark of its scope or environment."""
    known = host.request_class
    if hasattr(known, _RECORDS):
        return

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # becomes a method of the new class
        known.__init__(self, *args, **kwargs)
        mark = (getattr(self, "environ", None) or self.scope).get(MARK)
        if isinstance(mark, Routed):
            mark.request = self

    host.request_class = type(
        known.__name__, (known,), {"__init__": __init__, "__module__": known.__module__, _RECORDS: True}
    )
