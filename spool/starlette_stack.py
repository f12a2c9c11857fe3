"""Moves the middleware outside all others of the Starlette or FastAPI application that it was added to.

`add_middleware` puts a middleware inside `ServerErrorMiddleware`, which responds to unhandled exceptions. There, the
middleware could not see that response: it would have no request id, and its status would be unknown. So the first
call (under a server, the lifespan) replaces the application's stack by one with the middleware outside.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import copy
from typing import Any

from spool.interruption import is_foreign
from spool.request import inner_of


def put_outermost(middleware: Any, scope: Mapping[str, Any]) -> Any:
    """Move the middleware outside the stack of the scope's application, if the stack contains it.

    Return the application that must serve the current call in place of the middleware, or None. If the
    current call is a request, it is already inside the stack: it gets a `ServerErrorMiddleware` of its own
    inside the middleware, and the outer one loses its handler, so that the application's handler runs once.
    This is not done if one of the application's middlewares lies in between, because it may handle errors
    itself.
    """
    try:
        return _put_outermost(middleware, scope)
    except Exception as error:  # a Starlette release that stores its stack differently
        if is_foreign(error):
            raise
        return None


def _put_outermost(middleware: Any, scope: Mapping[str, Any]) -> Any:
    errors = sys.modules.get("starlette.middleware.errors")
    stack: Any = getattr(scope["app"], "middleware_stack", None)
    if errors is None or type(stack) is not errors.ServerErrorMiddleware:
        return None
    if "router" in scope and not _is_in(stack, middleware):  # it is in a mounted application
        return None
    outermost = _around(middleware, copy(stack))
    scope["app"].middleware_stack = outermost
    if not _only_the_frameworks_own(stack.app, middleware):
        return None
    inner = copy(stack)
    inner.app = middleware._app
    stack.handler, stack.debug = None, False
    return _around(middleware, inner)


def _around(middleware: Any, app: Any) -> Any:
    made = copy(middleware)
    made._app = app
    return made


def _is_in(layer: object, middleware: object) -> bool:
    return any(each is middleware for each in inner_of(layer))


def _only_the_frameworks_own(layer: Any, innermost: object) -> bool:
    while layer is not innermost:
        module = type(layer).__module__
        if not module.startswith(("starlette.", "fastapi.")) or hasattr(layer, "dispatch_func"):
            return False
        layer = getattr(layer, "app", None)
    return True
