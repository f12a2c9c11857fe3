"""The path templates of Starlette's and FastAPI's routes, including the routers and mounts around them.

Every release stores the chosen endpoint in the scope; only some store the route itself, and the path before a
mount removed its prefix. So the routes are listed once, by endpoint. If several routes have the same
endpoint, their patterns decide. Everything that a foreign application or a directory in a mount serves is
labelled with the path of the mount.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Final

from spool.request import MIDDLEWARE, UNMATCHED, wrapped_with
from spool.routes import Routed, watch

_CONVERTER: Final = re.compile(r"\{(\w+):[^{}]*\}")
_LONGEST_ROUTE: Final = 1024
_REST: Final = "/{_:path}"
"""The part of a template after the path of a mount."""
_LIST_AGAIN_SECONDS: Final = 1.0
"""Routes may be added while the application runs, but an endpoint without a route must not cause a listing
per request."""


def without_converters(route: str) -> str:
    """Return a route's path without the converters of its parameters (`{id:int}`)."""
    # Longer paths are not cached: a router that reports the client's path as its route would fill the memory.
    return _remembered(route) if len(route) <= _LONGEST_ROUTE else _CONVERTER.sub(r"{\1}", route)


@lru_cache(maxsize=1024)
def _remembered(route: str) -> str:
    return _CONVERTER.sub(r"{\1}", route)


class StarletteRoutes:
    """The routes of a Starlette application or router."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._list()

    def template(self, routed: Routed) -> str:
        scope = routed.scope
        if routed.path is None and "router" not in scope:
            return MIDDLEWARE
        endpoint = scope.get("endpoint")
        paths = () if endpoint is None or endpoint is routed.arrived else self._paths_of(endpoint)
        if not paths:
            return UNMATCHED
        path = paths[0] if len(paths) == 1 else _matching(paths, routed.path or scope["path"])
        return routed.mounted_at + without_converters(path.removesuffix(_REST)) or "/"

    def _paths_of(self, endpoint: object) -> Sequence[str]:
        known = self._paths.get(id(endpoint))
        if known is None and time.monotonic() - self._listed_at > _LIST_AGAIN_SECONDS:
            self._list()
            known = self._paths.get(id(endpoint))
        return () if known is None else known[1]

    def _list(self) -> None:
        self._listed_at = time.monotonic()
        paths: dict[int, tuple[object, list[str]]] = {}
        watch(getattr(self._host, "router", self._host), "middleware_stack")
        for endpoint, path in _endpoints(self._host.routes, ""):
            paths.setdefault(id(endpoint), (endpoint, []))[1].append(path)
        self._paths = paths


def _endpoints(routes: Iterable[Any], prefix: str) -> Iterator[tuple[object, str]]:
    """Yield each endpoint with its path; a foreign mounted application counts as an endpoint."""
    for route in routes:
        if hasattr(route, "effective_route_contexts"):  # included routers in newer releases of FastAPI
            contexts = route.effective_route_contexts()
            yield from _endpoints((each.starlette_route or each for each in contexts), prefix)
            continue
        path = prefix + getattr(route, "path", "")  # a Host route has none
        if (endpoint := getattr(route, "endpoint", None)) is not None:
            yield endpoint, path
        elif (app := getattr(route, "app", None)) is not None:
            inner = wrapped_with(app, "url_path_for")
            if inner is None:
                yield app, path + _REST
            else:
                watch(getattr(inner, "router", inner), "middleware_stack")
                yield from _endpoints(inner.routes, path)


def _matching(paths: Sequence[str], path: str) -> str:
    from starlette.routing import compile_path

    return next((each for each in paths if compile_path(each)[0].match(path)), paths[0])
