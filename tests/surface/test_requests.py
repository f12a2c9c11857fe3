"""Request metrics and ids under the frameworks themselves: FastAPI, Starlette, Flask and Django."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from spool import Emitter, asgi, context, wsgi
from spool.context import bind, update
from spool.testing import Recorder, record
from tests.processes import eventually

USER = uuid.uuid4()


def labels(recorded: Recorder, name: str = "api_request_count") -> list[tuple[str, str, str]]:
    """Return endpoint, method and status of each metric with a name."""
    return [tuple(each["labels"].values()) for each in recorded.of(name)]


def fastapi(emitter: Emitter) -> FastAPI:
    app = FastAPI()
    inner, deep = APIRouter(prefix="/families/{family}"), APIRouter()

    def user() -> None:  # FastAPI calls it in a thread
        update(user_id=USER, family_unit_id=USER, role="parent")

    @deep.get("/memories/{memory:path}")
    async def memory(family: int, memory: str) -> str:
        return memory

    @inner.get("/feed")
    def feed(family: int) -> int:
        return family

    @app.post("/memories", dependencies=[Depends(user)])
    async def post(tasks: BackgroundTasks) -> str | None:
        tasks.add_task(emitter.emit_event, event_type="memory_processed")
        return emitter.emit_event(event_type="memory_posted")

    @app.get("/fails")
    async def fails() -> None:
        raise LookupError("the application's own")

    async def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("plain")

    @app.websocket("/socket")
    async def socket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    inner.include_router(deep)
    app.include_router(inner, prefix="/api")
    app.mount("/files/{album}", Starlette(routes=[Route("/{photo:int}", plain)]))
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter, exclude=("/health",))
    return app


def test_endpoints_are_templates_whatever_router_they_are_in(emitter: Emitter, recorded: Recorder) -> None:
    client = TestClient(fastapi(emitter))
    for path in (
        "/api/families/7/feed",
        "/api/families/7/memories/a/b",
        "/files/7/8",
        "/nothing/7",
        "/health",
    ):
        client.get(path)
    client.delete("/memories")
    client.request("BREW", "/memories")
    assert labels(recorded) == [
        ("/api/families/{family}/feed", "GET", "200"),
        ("/api/families/{family}/memories/{memory}", "GET", "200"),
        ("/files/{album}/{photo}", "GET", "200"),
        ("unmatched", "GET", "404"),
        ("/memories", "DELETE", "405"),
        ("/memories", "OTHER", "405"),
    ]
    assert labels(recorded) == labels(recorded, "api_request_duration_ms")
    assert not labels(recorded, "api_request_error_count")


def test_the_request_id_is_taken_when_sane_bound_and_returned(emitter: Emitter, recorded: Recorder) -> None:
    client = TestClient(fastapi(emitter))
    given = client.post("/memories", headers={"X-Request-ID": "abc-123"})
    assert given.headers["x-request-id"] == "abc-123"
    for insane in ("x" * 300, "a b", "<script>", ""):
        made = client.post("/memories", headers={"X-Request-ID": insane}).headers["x-request-id"]
        assert uuid.UUID(made).version == 7
    assert recorded.of("memory_posted")[0]["metadata"]["request_id"] == "abc-123"
    assert context.in_force() is None


def test_who_a_dependency_found_is_in_the_events_of_the_endpoint_and_of_its_background_task(
    emitter: Emitter, recorded: Recorder
) -> None:
    TestClient(fastapi(emitter)).post("/memories", headers={"X-Request-ID": "r1"})
    assert [each["event_type"] for each in recorded.events] == ["memory_posted", "memory_processed"]
    for made in recorded.events:
        assert made["user_id"] == str(USER)
        assert made["metadata"] == {"role": "parent", "request_id": "r1"}


def test_a_block_in_a_sync_dependency_or_a_sync_stream_never_fails_a_request(
    emitter: Emitter, recorded: Recorder
) -> None:
    """FastAPI runs each part of both in a separate copy of the context."""

    def dependency() -> Iterator[None]:
        with bind(user_id=USER, family_unit_id=USER):
            yield

    def pieces() -> Iterator[str]:
        with bind(user_id=USER, family_unit_id=USER):
            for _ in range(3):
                emitter.emit_event(event_type="piece_sent")
                yield "piece"

    app = FastAPI()
    app.get("/dependency", dependencies=[Depends(dependency)])(lambda: str(context.current().user_id))
    app.get("/stream")(lambda: StreamingResponse(pieces()))
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    client = TestClient(app)
    with record(emitter, strict=False) as recording:
        assert client.get("/dependency").json() == "None"
        assert client.get("/stream").text == "piecepiecepiece"
    assert {each["user_id"] for each in recording.of("piece_sent")} == {str(USER)}
    assert labels(recording) == [("/dependency", "GET", "200"), ("/stream", "GET", "200")]


def test_a_request_that_is_given_up_in_another_context_ends_quietly(
    emitter: Emitter, recorded: Recorder
) -> None:
    async def app(*_: Any) -> None:
        await asyncio.sleep(60)

    async def send(_: Any) -> None:
        raise AssertionError("nothing is sent")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    request = asgi.AnalyticsMiddleware(app, emitter=emitter)(scope, receive=send, send=send)  # type: ignore[arg-type]

    async def begin() -> None:
        request.send(None)

    asyncio.run(begin())
    request.close()  # like the garbage collector
    assert labels(recorded) == [("unmatched", "GET", "499")]


def test_an_exception_of_the_application_is_counted_and_raised_unchanged(
    emitter: Emitter, recorded: Recorder
) -> None:
    app = fastapi(emitter)
    with pytest.raises(LookupError, match="the application's own"):
        TestClient(app).get("/fails")
    assert TestClient(app, raise_server_exceptions=False).get("/fails").status_code == 500
    assert labels(recorded, "api_request_error_count") == [("/fails", "GET", "500")] * 2
    assert labels(recorded) == [("/fails", "GET", "500")] * 2


def test_websockets_and_lifespan_have_no_metrics(emitter: Emitter, recorded: Recorder) -> None:
    with TestClient(fastapi(emitter)) as client, client.websocket_connect("/socket") as socket:
        assert socket.receive_text() == "hello"
    assert not recorded.records


def is_prepared(emitter: Emitter) -> bool:
    """Whether a segment and the housekeeping thread exist, and no line is written yet."""
    segments = list(emitter.settings.directory.glob("*.open"))
    return len(segments) == 1 and emitter._housekeeper._running is not None and not emitter.stats().segments


def test_no_request_pays_for_the_first_segment_under_asgi(emitter: Emitter) -> None:
    with TestClient(fastapi(emitter)) as client:  # the lifespan has started, but no request
        assert is_prepared(emitter)
        assert client.get("/api/families/7/feed").json() == 7
    assert emitter.stats().emitted == 2
    emitter.close()


def test_no_request_of_a_worker_forked_after_the_start_pays_for_the_first_segment(tmp_path: Path) -> None:
    async def app(*_: Any) -> None: ...

    emitter = Emitter(tmp_path)
    app = asgi.AnalyticsMiddleware(app, emitter=emitter)
    if (child := os.fork()) == 0:
        eventually(lambda: list(tmp_path.glob(f"*-{os.getpid()}-*.open")))
        asyncio.run(app({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
        os._exit(len(list(tmp_path.glob(f"*-{os.getpid()}-*.open"))) != 1)
    assert os.waitpid(child, 0)[1] == 0
    emitter.close()


def test_no_request_pays_for_the_first_segment_under_wsgi(emitter: Emitter) -> None:
    wsgi.AnalyticsMiddleware(lambda *_: [], emitter=emitter)
    assert is_prepared(emitter)
    emitter.close()


def test_a_stream_is_timed_to_its_last_byte(emitter: Emitter, recorded: Recorder) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            await asyncio.sleep(0.01)
            yield b"piece"

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(pieces())

    app = asgi.AnalyticsMiddleware(Starlette(routes=[Route("/stream", stream)]), emitter=emitter)
    assert TestClient(app).get("/stream").content == b"piece" * 5
    (duration,) = recorded.of("api_request_duration_ms")
    assert duration["value"] >= 50


def test_a_client_that_goes_away_is_counted_as_such(emitter: Emitter, recorded: Recorder) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"piece"
            await asyncio.sleep(0)

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    app = asgi.AnalyticsMiddleware(Starlette(routes=[Route("/stream", stream)]), emitter=emitter)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        while len(sent) < 5:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "query_string": b"",
             "asgi": {"spec_version": "2.3"}, "root_path": ""}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert labels(recorded) == [("/stream", "GET", "499")]
    assert not labels(recorded, "api_request_error_count")


def test_a_broken_emitter_never_reaches_a_response(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file, not a directory")
    emitter = Emitter(tmp_path / "spool")
    assert TestClient(fastapi(emitter)).get("/api/families/7/feed").json() == 7
    assert emitter.stats().dropped == {"disk": 2}


# ---- WSGI -------------------------------------------------------------------------------------------


def flask(emitter: Emitter) -> Any:
    from flask import Flask

    app = Flask(__name__)

    @app.get("/families/<int:family>/feed")
    def feed(family: int) -> str:
        update(user_id=USER, family_unit_id=USER)
        emitter.emit_event(event_type="feed_viewed")
        return str(family)

    @app.get("/fails")
    def fails() -> str:
        raise LookupError("the application's own")

    @app.get("/stream")
    def stream() -> Any:
        def pieces() -> Iterator[bytes]:
            for _ in range(3):
                update(user_id=USER, family_unit_id=USER)
                emitter.emit_event(event_type="piece_sent")
                yield b"piece"

        return app.response_class(pieces())

    app.config["PROPAGATE_EXCEPTIONS"] = True
    app.wsgi_app = wsgi.AnalyticsMiddleware(  # type: ignore[method-assign]
        app.wsgi_app, emitter=emitter, exclude=("/health",)
    )
    return app


def django(emitter: Emitter) -> Any:
    import django
    from django.conf import settings
    from django.core.wsgi import get_wsgi_application
    from django.http import HttpResponse, StreamingHttpResponse
    from django.urls import path

    def feed(request: Any, family: int) -> Any:
        update(user_id=USER, family_unit_id=USER)
        emitter.emit_event(event_type="feed_viewed")
        return HttpResponse(str(family))

    def fails(request: Any) -> Any:
        raise LookupError("the application's own")

    def stream(request: Any) -> Any:
        def pieces() -> Iterator[bytes]:
            for _ in range(3):
                update(user_id=USER, family_unit_id=USER)
                emitter.emit_event(event_type="piece_sent")
                yield b"piece"

        return StreamingHttpResponse(pieces())

    class Urls:
        urlpatterns: ClassVar = [
            path("families/<int:family>/feed", feed), path("fails", fails), path("stream", stream)
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
    return wsgi.AnalyticsMiddleware(get_wsgi_application(), emitter=emitter, exclude=("/health",))


class Client:
    """Calls a WSGI application like a server."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def get(
        self, path: str, request_id: str | None = None, pieces: int | None = None
    ) -> tuple[str, Any, bytes]:
        """Return status, headers and body; the client disconnects after the given number of pieces."""
        from werkzeug.test import EnvironBuilder

        environ = EnvironBuilder(path).get_environ()
        if request_id:
            environ["HTTP_X_REQUEST_ID"] = request_id
        started: list[Any] = []
        result = self._app(environ, lambda status, headers, exc_info=None: started.append((status, headers)))
        body = b""
        try:
            for number, piece in enumerate(result):
                if number == pieces:
                    break
                body += piece
        finally:
            result.close()
        ((status, headers),) = started
        return status[:3], dict(headers), body


FRAMEWORKS = {
    "flask": (flask, "/families/<int:family>/feed"),
    "django": (django, "/families/<int:family>/feed"),
}


@pytest.mark.parametrize(("make", "template"), FRAMEWORKS.values(), ids=FRAMEWORKS.keys())
def test_the_same_under_flask_and_django(
    emitter: Emitter, recorded: Recorder, make: Callable[[Emitter], Any], template: str
) -> None:
    pytest.importorskip(make.__name__)
    client = Client(make(emitter))
    status, headers, body = client.get("/families/7/feed", request_id="r1")
    assert (status, body, headers["X-Request-ID"]) == ("200", b"7", "r1")
    (made,) = recorded.events
    assert made["user_id"] == str(USER) and made["metadata"] == {"request_id": "r1"}
    client.get("/nothing/7")
    client.get("/health")
    with pytest.raises(LookupError, match="the application's own"):
        client.get("/fails")
    assert labels(recorded) == [
        (template, "GET", "200"), ("unmatched", "GET", "404"), ("/fails", "GET", "500")
    ]  # fmt: skip
    assert labels(recorded, "api_request_error_count") == [("/fails", "GET", "500")]
    assert context.in_force() is None


@pytest.mark.parametrize("make", [flask, django], ids=["flask", "django"])
def test_a_wsgi_stream_keeps_its_context_to_the_end_and_its_client_may_go_away(
    emitter: Emitter, recorded: Recorder, make: Callable[[Emitter], Any]
) -> None:
    pytest.importorskip(make.__name__)
    client = Client(make(emitter))
    assert client.get("/stream", request_id="r1")[2] == b"piece" * 3
    assert {each["metadata"]["request_id"] for each in recorded.of("piece_sent")} == {"r1"}
    client.get("/stream", pieces=1)
    assert labels(recorded) == [("/stream", "GET", "200"), ("/stream", "GET", "499")]
