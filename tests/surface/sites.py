"""The same site in each framework, with the middleware installed as in the README, for separate servers.

`app`, of the interface in the variable INTERFACE, passes a request to the framework in its header
`x-framework`. Frameworks that are not installed are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette import responses
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from spool import asgi

HOME = Path(os.environ["SITE"])
PHOTO = HOME / "photo"
PHOTO.write_bytes(b"x" * 200_000)


class Broken(Exception):
    """An exception that the sites raise deliberately."""


def pieces() -> Iterator[bytes]:
    for _ in range(3):
        yield b"piece"


def broken() -> Iterator[bytes]:
    yield b"piece"
    raise Broken


async def pieces_async() -> AsyncIterator[bytes]:
    for piece in pieces():
        yield piece
        await asyncio.sleep(0)


async def broken_async() -> AsyncIterator[bytes]:
    for piece in broken():
        yield piece
        await asyncio.sleep(0)


# ---- Starlette and FastAPI ------------------------------------------------------------------------------


async def item(request: Request) -> Response:
    return PlainTextResponse(str(request.path_params["item"]))


async def fails(request: Request) -> Response:
    raise Broken


async def gone(request: Request) -> Response:
    raise HTTPException(410)


async def posted(request: Request) -> Response:
    return responses.JSONResponse(await request.json(), status_code=201)


async def file(request: Request) -> Response:
    return responses.FileResponse(PHOTO)


async def stream(request: Request) -> Response:
    return responses.StreamingResponse(pieces_async())


async def breaks(request: Request) -> Response:
    return responses.StreamingResponse(broken_async())


async def moved(request: Request) -> Response:
    return responses.RedirectResponse("/items/7", status_code=302)


async def locks(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    return (
        PlainTextResponse("no", status_code=401)
        if "locked" in request.query_params
        else await call_next(request)
    )


VIEWS = {
    "/items/{item:int}": item, "/fails": fails, "/gone": gone, "/file": file, "/stream": stream, "/broken": breaks,
    "/moved": moved,
}  # fmt: skip


def add_middlewares(app: Any) -> Any:
    app.add_middleware(BaseHTTPMiddleware, dispatch=locks)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(asgi.AnalyticsMiddleware)
    return app


def starlette() -> Any:
    routes = [Route(path, view) for path, view in VIEWS.items()]
    return add_middlewares(Starlette(routes=[*routes, Route("/posted", posted, methods=["POST"])]))


def fastapi() -> Any:
    app, router = FastAPI(), APIRouter()
    for path, view in VIEWS.items():
        router.add_api_route(path, view, methods=["GET"], response_model=None)
    router.add_api_route("/posted", posted, methods=["POST"], response_model=None)
    app.include_router(router)
    return add_middlewares(app)


# ---- others ---------------------------------------------------------------------------------------------


def litestar() -> Any:
    import litestar as framework
    from litestar.config.cors import CORSConfig
    from litestar.response import File, Redirect, Stream

    async def item() -> str:
        return "item"

    async def fails() -> str:
        raise Broken

    async def gone() -> str:
        raise framework.exceptions.HTTPException(status_code=410)

    async def posted(request: Any) -> Any:
        return await request.json()

    async def file() -> Any:
        return File(PHOTO)

    async def stream() -> Any:
        return Stream(pieces_async())

    async def breaks() -> Any:
        return Stream(broken_async())

    async def moved() -> Any:
        return Redirect("/items/7")

    posted.__annotations__["request"] = framework.Request
    views = {"/items/{item:int}": item, "/fails": fails, "/gone": gone, "/file": file, "/stream": stream,
             "/broken": breaks}  # fmt: skip
    handlers = [framework.get(path)(view) for path, view in views.items()]
    handlers += [framework.post("/posted")(posted), framework.get("/moved", status_code=302)(moved)]
    app = framework.Litestar(handlers, cors_config=CORSConfig(allow_origins=["*"]))
    return asgi.AnalyticsMiddleware(app)


def quart() -> Any:
    from quart import Quart, Response, abort, redirect, request, send_file

    app = Quart(__name__)

    async def item(item: int) -> str:
        return str(item)

    async def fails() -> str:
        raise Broken

    async def gone() -> str:
        abort(410)

    async def posted() -> Any:
        return await request.get_json(), 201

    async def file() -> Any:
        return await send_file(PHOTO)

    async def stream() -> Any:
        return Response(pieces_async())

    async def breaks() -> Any:
        return Response(broken_async())

    async def moved() -> Any:
        return redirect("/items/7")

    add_views(app, item, fails, gone, posted, file, stream, breaks, moved)
    app.before_request(lambda: ("locked", 401) if "locked" in request.args else None)
    app.asgi_app = asgi.AnalyticsMiddleware(app.asgi_app)  # type: ignore[method-assign,arg-type,assignment,unused-ignore]
    return app


def flask() -> Any:
    from flask import Flask, Response, abort, redirect, request, send_file

    from spool.flask import Analytics

    app = Flask(__name__)

    def item(item: int) -> str:
        return str(item)

    def fails() -> str:
        raise Broken

    def gone() -> str:
        abort(410)

    def posted() -> Any:
        return request.get_json(), 201

    def file() -> Any:
        return send_file(PHOTO)

    def stream() -> Any:
        return Response(pieces())

    def breaks() -> Any:
        return Response(broken())

    def moved() -> Any:
        return redirect("/items/7")

    add_views(app, item, fails, gone, posted, file, stream, breaks, moved)
    app.before_request(lambda: ("locked", 401) if "locked" in request.args else None)
    Analytics(app)
    return app


def add_views(app: Any, *views: Callable[..., Any]) -> None:
    paths = {"item": "/items/<int:item>", "breaks": "/broken"}
    for view in views:
        name = view.__name__
        methods = ["POST"] if name == "posted" else ["GET"]
        app.add_url_rule(paths.get(name, f"/{name}"), view_func=view, methods=methods)


class DjangoUrls:
    """The URL configuration, filled when Django is set up."""

    urlpatterns: list[Any]


def set_up_django(*middlewares: str) -> None:
    import django
    from django import http
    from django.conf import settings
    from django.urls import path
    from django.views.decorators.http import require_GET

    def item(request: Any, item: int) -> Any:
        return http.HttpResponse(str(item))

    def fails(request: Any) -> Any:
        raise Broken

    def gone(request: Any) -> Any:
        return http.HttpResponseGone()

    def posted(request: Any) -> Any:
        return http.HttpResponse(json.dumps(json.loads(request.body)), status=201)

    def file(request: Any) -> Any:
        return http.FileResponse(PHOTO.open("rb"))

    def stream(request: Any) -> Any:
        return http.StreamingHttpResponse(pieces_async() if hasattr(request, "scope") else pieces())

    def breaks(request: Any) -> Any:
        return http.StreamingHttpResponse(broken_async() if hasattr(request, "scope") else broken())

    def moved(request: Any) -> Any:
        return http.HttpResponseRedirect("/items/7")

    DjangoUrls.urlpatterns = [
        path("items/<int:item>", require_GET(item)), path("fails", fails), path("gone", gone), path("moved", moved),
        path("posted", posted), path("file", file), path("stream", stream), path("broken", breaks),
    ]  # fmt: skip
    settings.configure(
        ROOT_URLCONF=DjangoUrls, ALLOWED_HOSTS=["*"], SECRET_KEY="x", LOGGING_CONFIG=None,
        MIDDLEWARE=[*middlewares, f"{__name__}.django_locks"],
    )  # fmt: skip
    django.setup()


def django_locks(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from django.http import HttpResponse

    return lambda request: HttpResponse(status=401) if "locked" in request.GET else get_response(request)


def django_asgi() -> Any:
    from django.core.asgi import get_asgi_application

    set_up_django()
    return asgi.AnalyticsMiddleware(get_asgi_application())


def django_wsgi() -> Any:
    from django.core.wsgi import get_wsgi_application

    set_up_django("spool.django.AnalyticsMiddleware")
    return get_wsgi_application()


def bare() -> Any:
    """Serve requests without a framework, for cases that frameworks do not allow."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/cancelled":
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()

    return asgi.AnalyticsMiddleware(app)


# ---- what servers load ----------------------------------------------------------------------------------

ASGI = {
    "starlette": starlette, "fastapi": fastapi, "litestar": litestar, "quart": quart, "django": django_asgi,
    "bare": bare,
}  # fmt: skip
WSGI = {"flask": flask, "django": django_wsgi}


def _installed(makers: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return made


def _asgi(made: dict[str, Any]) -> Callable[..., Awaitable[None]]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        name = next(value for key, value in scope["headers"] if key == b"x-framework").decode()
        await made[name](scope, receive, send)

    return app


def _wsgi(made: dict[str, Any]) -> Callable[..., Any]:
    return lambda environ, start: made[environ["HTTP_X_FRAMEWORK"]](environ, start)


# Django can be set up only once in a process.
app = _asgi(_installed(ASGI)) if os.environ["INTERFACE"] == "asgi" else _wsgi(_installed(WSGI))
