"""The label of an endpoint is the template of its route or one of three words, never the client's path."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient

from spool import Emitter, asgi, context, wsgi
from spool.testing import Recorder
from tests.surface.test_requests import USER, Client, labels

PREFLIGHT = {"Origin": "https://family.example", "Access-Control-Request-Method": "GET"}


def endpoints(recorded: Recorder) -> list[str]:
    return [each[0] for each in labels(recorded)]


async def plain(request: Request) -> PlainTextResponse:
    return PlainTextResponse("plain")


class Copies:
    """A middleware that passes a copy of the scope to the inner application."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(dict(scope), receive, send)


class Photo(HTTPEndpoint):
    async def get(self, request: Request) -> Response:
        return PlainTextResponse("photo")


def starlette(directory: Path) -> Starlette:
    (directory / "a.css").write_text("a")
    inner = Starlette(
        routes=[Route("/of/{day:int}", plain), Mount("/deep", routes=[Route("/{rest:path}", plain)])]
    )
    return Starlette(
        routes=[
            Route("/", plain),
            Route("/photos/{photo:uuid}", Photo),
            Route("/same/{first:int}", plain),
            Route("/numbers/{a:int}/{b:float}", plain),
            Mount("/albums/{album:int}", app=inner),
            Mount("/behind", app=Copies(Starlette(routes=[Route("/{name}", plain)]))),
            Mount("/foreign", app=PlainTextResponse("of another framework")),
            Mount("/static", app=StaticFiles(directory=directory)),
            Host("{tenant}.example", app=Router(routes=[Route("/tenant/{key}", plain)])),
        ]
    )  # fmt: skip


STARLETTE = {
    "/": "/",
    f"/photos/{uuid.uuid4()}": "/photos/{photo}",
    f"/photos/{str(uuid.uuid4()).upper()}": "/photos/{photo}",
    "/same/007": "/same/{first}",
    "/numbers/007/1.50": "/numbers/{a}/{b}",
    "/albums/007/of/08": "/albums/{album}/of/{day}",
    "/albums/007/deep/a/b": "/albums/{album}/deep/{rest}",
    "/albums/007/nothing": "unmatched",
    "/behind/me": "/behind/{name}",
    "/foreign/a/b": "/foreign",
    "/static/a.css": "/static",
    "/static/../etc/passwd": "unmatched",
    "/static/nothing": "/static",
    "/same/7/": "unmatched",  # a redirect
    "/anything-unmatched": "unmatched",
    "/unmatched": "unmatched",
}


@pytest.mark.parametrize("around", [False, True], ids=["added", "around"])
@pytest.mark.parametrize("copies", [False, True], ids=["one-scope", "copied-scope"])
def test_the_templates_of_starlette(
    emitter: Emitter, recorded: Recorder, tmp_path: Path, around: bool, copies: bool
) -> None:
    app: Any = starlette(tmp_path)
    if copies:
        app.add_middleware(Copies)
    if around:
        app = asgi.AnalyticsMiddleware(app, emitter=emitter)
    else:
        app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app, follow_redirects=False)
    for path in STARLETTE:
        client.get(path)
    assert dict(zip(STARLETTE, endpoints(recorded), strict=True)) == STARLETTE
    recorded.clear()
    client.get("/tenant/7", headers={"Host": "smith.example"})
    assert endpoints(recorded) == ["/tenant/{key}"]


def test_the_templates_of_fastapi_with_one_router_included_twice(
    emitter: Emitter, recorded: Recorder
) -> None:
    app, shared, deep = FastAPI(), APIRouter(prefix="/families/{family}"), APIRouter()

    @shared.get("/feed/{page:int}")
    def feed(family: int, page: int) -> int:
        return page

    @deep.get("/deep/{rest:path}")
    async def rest(family: int, rest: str) -> str:
        return rest

    shared.include_router(deep, prefix="/very")
    app.include_router(shared, prefix="/v1")
    app.include_router(shared, prefix="/v2")
    app.add_route("/plain/{word}", plain)
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app)
    paths = {
        "/v1/families/007/feed/08": "/v1/families/{family}/feed/{page}",
        "/v2/families/007/feed/08": "/v2/families/{family}/feed/{page}",
        "/v2/families/x/feed/8": "/v2/families/{family}/feed/{page}",  # an invalid value: 422
        "/v2/families/7/very/deep/a/b": "/v2/families/{family}/very/deep/{rest}",
        "/plain/spoken": "/plain/{word}",
        "/openapi.json": "/openapi.json",
        "/v3/families/7/feed/8": "unmatched",
    }
    for path in paths:
        client.get(path)
    assert dict(zip(paths, endpoints(recorded), strict=True)) == paths


def test_a_route_that_is_added_while_the_application_runs_has_its_template(
    emitter: Emitter, recorded: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spool.starlette_routes._LIST_AGAIN_SECONDS", 0)
    app = FastAPI()
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app)
    client.get("/later/1")
    app.get("/later/{number}")(lambda number: number)
    client.get("/later/1")
    assert endpoints(recorded) == ["unmatched", "/later/{number}"]


@pytest.mark.parametrize("root_path", ["", "/api"])
def test_the_template_does_not_depend_on_where_a_proxy_serves_the_application(
    emitter: Emitter, recorded: Recorder, root_path: str
) -> None:
    app = Starlette(routes=[Route("/memories/{memory:int}", plain)])
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    TestClient(app, root_path=root_path).get(f"{root_path}/memories/007")
    TestClient(app, root_path=root_path).get("/memories/007")  # a proxy that cuts it off
    assert endpoints(recorded) == ["/memories/{memory}"] * 2


@pytest.mark.parametrize("added", [False, True], ids=["around", "added"])
def test_the_template_of_a_mounted_application_that_has_the_middleware_begins_with_its_mount(
    emitter: Emitter, recorded: Recorder, added: bool
) -> None:
    inner: Any = Starlette(routes=[Route("/items/{item:int}", plain)])
    if added:
        inner.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    else:
        inner = asgi.AnalyticsMiddleware(inner, emitter=emitter)
    client = TestClient(Starlette(routes=[Mount("/shop", app=inner), Mount("/{name}", app=inner)]))
    for path in ("/shop/items/007", "/typed/items/007", "/shop/nothing"):
        client.get(path)
    assert endpoints(recorded) == ["/shop/items/{item}", "/items/{item}", "unmatched"]


def test_preflights_and_answers_of_inner_middlewares_have_labels_of_their_own(
    emitter: Emitter, recorded: Recorder
) -> None:
    app = FastAPI()
    app.get("/items/{item}")(lambda item: item)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        return (
            PlainTextResponse("no", status_code=401)
            if "locked" in request.headers
            else await call_next(request)
        )

    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app)
    client.get("/items/7", headers={"locked": "1"})
    client.get("/typed", headers={"locked": "1"})
    client.options("/typed", headers=PREFLIGHT)
    client.options("/items/7")
    client.get("/items/7", headers={"Origin": "https://family.example"})
    assert labels(recorded) == [
        ("middleware", "GET", "401"), ("middleware", "GET", "401"), ("preflight", "OPTIONS", "200"),
        ("/items/{item}", "OPTIONS", "405"), ("/items/{item}", "GET", "200"),
    ]  # fmt: skip


def test_the_application_may_name_an_endpoint_itself(emitter: Emitter, recorded: Recorder) -> None:
    def endpoint(scope: Any) -> Any:
        match scope["path"]:
            case "/named":
                return "of its own"
            case "/number":
                return 7
            case "/fails":
                raise LookupError
        return None

    app = Starlette(routes=[Route("/{word}", plain)])
    client = TestClient(asgi.AnalyticsMiddleware(app, emitter=emitter, endpoint=endpoint))
    for word in ("named", "number", "fails", "other"):
        client.get(f"/{word}")
    assert endpoints(recorded) == ["of its own", "/{word}", "/{word}", "/{word}"]
    with pytest.raises(TypeError, match="endpoint must be a function"):
        wsgi.AnalyticsMiddleware(app, endpoint="/named")  # type: ignore[arg-type]


# ---- other frameworks ---------------------------------------------------------------------------------


def litestar() -> Any:
    litestar = pytest.importorskip("litestar")

    async def view() -> str:
        return "x"

    return litestar.Litestar([litestar.get(path)(view) for path in ("/items/{item:int}", "/")])


def quart() -> Any:
    app = pytest.importorskip("quart").Quart(__name__)

    async def view(item: int = 0) -> str:
        return str(item)

    for path in ("/items/<int:item>", "/"):
        app.add_url_rule(path, view_func=view)
    return app


def django_asgi() -> Any:
    from django.core.asgi import get_asgi_application

    django_urls()
    return get_asgi_application()


def django_urls() -> None:
    import django
    from django.conf import settings
    from django.http import HttpResponse
    from django.urls import include, path, re_path

    def view(request: Any, **_: Any) -> Any:
        return HttpResponse("x")

    def teapot(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda request: HttpResponse(status=418)

    class Urls:
        urlpatterns: ClassVar = [
            path("", view), path("items/<int:item>", view), path("of/<slug:who>/", include([path("<int:day>", view)])),
            re_path(r"^years/(?P<year>[0-9]{4})$", view),
        ]  # fmt: skip

    if not settings.configured:
        settings.configure(
            ROOT_URLCONF=Urls,
            ALLOWED_HOSTS=["*"],
            DEBUG=False,
            DEBUG_PROPAGATE_EXCEPTIONS=True,
            SECRET_KEY="x",
        )
        django.setup()
    settings.ROOT_URLCONF = Urls


ITEMS = {
    litestar: "/items/{item}",
    quart: "/items/<int:item>",
    django_asgi: "/items/<int:item>",
}


@pytest.mark.parametrize(("make", "template"), ITEMS.items(), ids=[each.__name__ for each in ITEMS])
@pytest.mark.parametrize("copies", [False, True], ids=["one-scope", "copied-scope"])
def test_the_templates_of_other_frameworks_under_asgi(
    emitter: Emitter, recorded: Recorder, make: Callable[[], Any], template: str, copies: bool
) -> None:
    app = make()
    app = Copies(app) if copies else app
    client = TestClient(asgi.AnalyticsMiddleware(app, emitter=emitter))
    for path in ("/items/007", "/items/x", "/anything-unmatched", "/"):
        client.get(path)
    assert endpoints(recorded) == [template, "unmatched", "unmatched", "/"]


def test_an_application_that_cannot_be_looked_into_is_served_nonetheless(
    emitter: Emitter, recorded: Recorder
) -> None:
    class Proxy:
        """An object like werkzeug's proxies outside a request."""

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await PlainTextResponse("x")(scope, receive, send)

    assert TestClient(asgi.AnalyticsMiddleware(Proxy(), emitter=emitter)).get("/").status_code == 200
    assert endpoints(recorded) == ["unmatched"]


def test_an_asgi_application_without_a_known_framework_is_unmatched(
    emitter: Emitter, recorded: Recorder
) -> None:
    client = TestClient(asgi.AnalyticsMiddleware(PlainTextResponse("x"), emitter=emitter))
    client.get("/typed")
    assert endpoints(recorded) == ["unmatched"]


def test_the_templates_of_django_are_those_that_it_resolved(emitter: Emitter, recorded: Recorder) -> None:
    from django.core.wsgi import get_wsgi_application

    django_urls()
    client = Client(wsgi.AnalyticsMiddleware(get_wsgi_application(), emitter=emitter))
    for path in ("/items/007", "/of/who/08", "/years/1999", "/anything-unmatched", "/"):
        client.get(path)
    assert endpoints(recorded) == [
        "/items/<int:item>", "/of/<slug:who>/<int:day>", "/^years/(?P<year>[0-9]{4})$", "unmatched", "/",
    ]  # fmt: skip


def test_the_templates_of_flask(emitter: Emitter, recorded: Recorder) -> None:
    from flask import Flask
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    def application() -> Flask:
        app = Flask(__name__)
        for path, methods in {
            "/items/<int:item>": ["GET"],
            "/slash/": ["GET"],
            "/posted/<word>": ["POST"],
        }.items():
            app.add_url_rule(path, path, lambda **_: "x", methods=methods)
        return app

    def guard(environ: Any, start: Any) -> Any:
        if environ["PATH_INFO"] == "/locked":
            start("401 Unauthorized", [])
            return []
        return mounted(environ, start)

    guard.app = mounted = DispatcherMiddleware(application().wsgi_app, {"/shop": application().wsgi_app})  # type: ignore[attr-defined]
    client = Client(wsgi.AnalyticsMiddleware(guard, emitter=emitter))
    paths = {
        "/items/007": "/items/<int:item>",
        "/shop/items/007": "/shop/items/<int:item>",
        "/slash": "unmatched",  # a redirect
        "/posted/here": "/posted/<word>",  # 405
        "/static/none.css": "/static/<path:filename>",
        "/anything-unmatched": "unmatched",
        "/locked": "middleware",
    }
    for path in paths:
        client.get(path)
    assert dict(zip(paths, endpoints(recorded), strict=True)) == paths


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_hostile_requests_make_no_more_labels_than_there_are_routes_and_three(
    emitter: Emitter, recorded: Recorder, tmp_path: Path, count: int
) -> None:
    app = starlette(tmp_path)

    async def guard(request: Request, call_next: Any) -> Any:
        return (
            PlainTextResponse("no", status_code=401)
            if "locked" in request.headers
            else await call_next(request)
        )

    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    seed = random.randrange(1 << 32)
    print("seed", seed)
    asyncio.run(send_all(app, list(hostile(random.Random(seed), count))))
    found = labels(recorded)
    assert len(found) == count
    assert len({each[0] for each in found}) <= 10 + 3
    assert {each[1] for each in found} <= {"GET", "POST", "HEAD", "OPTIONS", "OTHER"}


def hostile(chosen: random.Random, count: int) -> Iterator[tuple[str, str, list[tuple[bytes, bytes]]]]:
    """Yield method, path and headers."""
    prefixes = [
        *STARLETTE,
        "/same/",
        "/albums/",
        "/static/",
        "/foreign/",
        "/{first}",
        "/same/{first}/",
        "//",
        "",
    ]
    extra: list[list[tuple[bytes, bytes]]] = [
        [], [], [], [(b"locked", b"1")], [(name.lower().encode(), value.encode()) for name, value in PREFLIGHT.items()],
    ]  # fmt: skip
    for number in range(count):
        typed = chosen.choice(
            [str(number), uuid.uuid4().hex, "{}", "%7Bx%7D", "ü\0", "unmatched", "/a/" * 9, ":int"]
        )
        method = chosen.choice(["GET", "POST", "HEAD", "OPTIONS", f"BREW{number}", "get", ""])
        yield method, chosen.choice(prefixes) + typed, chosen.choice(extra)


async def send_all(app: Any, requests: list[tuple[str, str, list[tuple[bytes, bytes]]]]) -> None:
    async def send(message: Any) -> None:
        pass

    for method, path, headers in requests:
        messages = iter([{"type": "http.request", "body": b""}])

        async def receive(messages: Iterator[Any] = messages) -> Any:
            return next(messages, {"type": "http.disconnect"})

        await app(
            {
                "type": "http", "method": method, "path": path, "headers": [(b"host", b"x.example"), *headers],
                "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 80), "asgi": {},
            },
            receive, send,
        )  # fmt: skip


# ---- exclusion, double installation, ids ---------------------------------------------------------------


@pytest.mark.parametrize("middleware", [asgi.AnalyticsMiddleware, wsgi.AnalyticsMiddleware])
@pytest.mark.parametrize(
    "exclude", ["/health", b"/health", {"/health": 1}, None, 7, ["health"], [""], [b"/health"], [["/health"]]]
)
def test_anything_but_a_list_of_paths_is_refused(emitter: Emitter, middleware: Any, exclude: Any) -> None:
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="exclude"):
            middleware(plain, emitter=emitter, exclude=exclude)


EXCLUDED = {
    "/": True, "/health": True, "/health/": True, "/health/live": True, "/healthy": False, "/other": False,
}  # fmt: skip


@pytest.mark.parametrize("exclude", [["/", "/health"], ("/", "/health/"), {"/", "/health"}])
@pytest.mark.parametrize("root", ["", "/api"])
def test_excluded_paths_and_what_is_below_them_have_no_metrics_behind_any_proxy(
    emitter: Emitter, recorded: Recorder, exclude: Any, root: str
) -> None:
    app = TestClient(
        asgi.AnalyticsMiddleware(PlainTextResponse("x"), emitter=emitter, exclude=exclude), root_path=root
    )

    def simple(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return []

    served = wsgi.AnalyticsMiddleware(simple, emitter=emitter, exclude=exclude)
    for path, excluded in EXCLUDED.items():
        app.get(root + path)
        list(served({"SCRIPT_NAME": root, "PATH_INFO": path, "REQUEST_METHOD": "GET"}, lambda *_: None))
        assert len(labels(recorded)) == (0 if excluded else 2), path
        recorded.clear()


def test_the_root_of_a_mounted_application_is_its_root(emitter: Emitter, recorded: Recorder) -> None:
    inner = asgi.AnalyticsMiddleware(
        Starlette(routes=[Route("/", plain), Route("/health", plain)]),
        emitter=emitter,
        exclude=["/", "/health"],
    )
    client = TestClient(Starlette(routes=[Mount("/shop", app=inner)]))
    for path in ("/shop/", "/shop/health", "/shop/other"):
        client.get(path)
    assert labels(recorded) == [("unmatched", "GET", "404")]


def test_two_middlewares_count_once(emitter: Emitter, recorded: Recorder) -> None:
    inner = Starlette(routes=[Route("/item", plain)])
    inner.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    app: Any = Starlette(routes=[Mount("/inner", app=inner)])
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    app.add_middleware(Copies)
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    app = asgi.AnalyticsMiddleware(app, emitter=emitter)
    sent = TestClient(app).get("/inner/item", headers={"X-Request-ID": "r1"})
    assert labels(recorded) == [("/inner/item", "GET", "200")]
    assert sent.headers.get_list("x-request-id") == ["r1"]

    def simple(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return []

    recorded.clear()
    inside = wsgi.AnalyticsMiddleware(simple, emitter=emitter)
    Client(wsgi.AnalyticsMiddleware(inside, emitter=emitter)).get("/")
    assert len(labels(recorded)) == 1


@pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi")
@pytest.mark.parametrize("binds", [False, True])
def test_a_middleware_of_a_mounted_wsgi_application_does_not_count_again(
    emitter: Emitter, recorded: Recorder, binds: bool
) -> None:
    """Also if a separate task, which has bound values, runs the application."""
    from starlette.middleware.wsgi import WSGIMiddleware

    def simple(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"x"]

    old = WSGIMiddleware(wsgi.AnalyticsMiddleware(simple, emitter=emitter))

    async def in_a_task(scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            if binds:
                context.update(session_id=uuid.uuid4())
            await old(scope, receive, send)

        await asyncio.create_task(work())

    app = asgi.AnalyticsMiddleware(Starlette(routes=[Mount("/old", app=in_a_task)]), emitter=emitter)
    client = TestClient(app)
    for path in ("/old/x", "/old/ü"):
        client.get(path)
    assert labels(recorded) == [("/old", "GET", "200")] * 2


@pytest.mark.parametrize("lifespan", [False, True], ids=["first-request", "lifespan"])
@pytest.mark.parametrize("make", [Starlette, FastAPI])
@pytest.mark.parametrize("debug", [False, True])
def test_the_500_of_an_unhandled_exception_has_its_id(
    emitter: Emitter, recorded: Recorder, make: Any, lifespan: bool, debug: bool
) -> None:
    async def fails(request: Request) -> Response:
        raise LookupError("the application's own")

    app = make(debug=debug)
    app.add_route("/fails", fails)
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app, raise_server_exceptions=False)
    if lifespan:
        client.__enter__()
    for _ in range(2):
        assert client.get("/fails", headers={"X-Request-ID": "r1"}).headers["x-request-id"] == "r1"
    with pytest.raises(LookupError, match="the application's own"):
        TestClient(app).get("/fails")
    assert labels(recorded) == [("/fails", "GET", "500")] * 3


@pytest.mark.parametrize("lifespan", [False, True], ids=["first-request", "lifespan"])
@pytest.mark.parametrize("sync", [False, True])
def test_events_of_an_exception_handler_keep_their_user_and_its_status_is_counted(
    emitter: Emitter, recorded: Recorder, lifespan: bool, sync: bool
) -> None:
    def fails() -> None:
        context.update(user_id=USER, family_unit_id=USER)
        raise LookupError("the application's own")

    def handle(request: Request, error: Exception) -> PlainTextResponse:
        emitter.emit_event(event_type="failed")
        return PlainTextResponse("try later", status_code=503)

    async def handle_async(request: Request, error: Exception) -> PlainTextResponse:
        return handle(request, error)

    app = FastAPI()
    app.get("/fails")(fails)
    app.exception_handler(Exception)(handle if sync else handle_async)
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app, raise_server_exceptions=False)
    if lifespan:
        client.__enter__()
    for _ in range(2):
        assert client.get("/fails", headers={"X-Request-ID": "r1"}).status_code == 503
    assert labels(recorded) == [("/fails", "GET", "503")] * 2
    assert [(each["user_id"], each["metadata"]) for each in recorded.of("failed")] == [
        (str(USER), {"request_id": "r1"})
    ] * 2
    assert context.in_force() is None


def test_a_middleware_that_handles_exceptions_keeps_its_right_to(
    emitter: Emitter, recorded: Recorder
) -> None:
    """Also in the first request, when it is still around our middleware."""
    app = Starlette(routes=[])

    async def fails(request: Request) -> Response:
        raise LookupError("the application's own")

    class Apology:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.app(scope, receive, send)
            except LookupError:
                await PlainTextResponse("sorry", status_code=409)(scope, receive, send)

    app.add_route("/fails", fails)
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    app.add_middleware(Apology)
    client = TestClient(app)
    assert [client.get("/fails").status_code for _ in range(2)] == [409, 409]
    assert labels(recorded)[1] == ("/fails", "GET", "409")


def test_the_middlewares_import_no_framework() -> None:
    code = (
        "import sys, spool.asgi, spool.wsgi, spool.log_events\n"
        "frameworks = {'starlette', 'fastapi', 'flask', 'werkzeug', 'django', 'quart', 'litestar', 'asgiref', 'structlog'}\n"
        "assert not frameworks & set(sys.modules), frameworks & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
