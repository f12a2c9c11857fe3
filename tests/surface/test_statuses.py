"""The status of a request is the one sent; 499 if the client disconnected, 500 if there was no response."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.handlers import SimpleHandler
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from spool import Emitter, asgi, wsgi
from spool.testing import Recorder
from tests.surface.test_requests import labels

START = {"type": "http.response.start", "status": 200, "headers": []}
LAST = {"type": "http.response.body", "body": b"x"}
Application = Callable[[Any, Any, Any], Awaitable[None]]


def statuses(recorded: Recorder) -> tuple[list[str], list[str]]:
    """Return the statuses of all requests, and of those counted as errors."""
    return (
        [each[2] for each in labels(recorded)],
        [each[2] for each in labels(recorded, "api_request_error_count")],
    )


def sends(*messages: dict[str, Any], error: BaseException | None = None) -> Application:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    return app


def serve(
    app: Application, emitter: Emitter, *, arrives: Iterable[dict[str, Any]] = (), breaks: bool = False
) -> list[dict[str, Any]]:
    """Serve one request like a server; sending fails with OSError if the connection breaks."""
    sent: list[dict[str, Any]] = []
    messages = iter(arrives)

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        if breaks and message["type"] != "http.response.start":
            raise OSError("connection reset")
        sent.append(dict(message))

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}

    async def request() -> None:
        await asgi.AnalyticsMiddleware(app, emitter=emitter)(scope, receive, send)

    asyncio.run(request())
    return sent


WITH_TRAILERS = {**START, "trailers": True}
COMPLETE = {
    "a body": [START, LAST],
    "a body in pieces": [START, {**LAST, "more_body": True}, LAST],
    "a file that the server sends by its path": [START, {"type": "http.response.pathsend", "path": "/"}],
    "a file that the server sends by its descriptor": [
        START,
        {"type": "http.response.zerocopysend", "file": 1, "more_body": True},
        {"type": "http.response.zerocopysend", "file": 1},
    ],
    "trailers": [WITH_TRAILERS, LAST, {"type": "http.response.trailers", "headers": []}],
    "early hints": [{"type": "http.response.early_hint", "links": []}, START, LAST],
}


@pytest.mark.parametrize("messages", COMPLETE.values(), ids=COMPLETE.keys())
def test_each_kind_of_last_byte_ends_a_request(
    emitter: Emitter, recorded: Recorder, messages: list[dict[str, Any]]
) -> None:
    serve(sends(*messages), emitter)
    assert statuses(recorded) == (["200"], [])


def test_an_application_that_returns_without_a_response_is_a_500(
    emitter: Emitter, recorded: Recorder
) -> None:
    serve(sends(), emitter)
    assert statuses(recorded) == (["500"], ["500"])


@pytest.mark.parametrize("error", [None, LookupError("in the middle")])
def test_a_response_that_is_broken_off_has_the_status_that_was_sent_and_is_an_error(
    emitter: Emitter, recorded: Recorder, error: Exception | None
) -> None:
    app = sends(START, {**LAST, "more_body": True}, error=error)
    if error is None:
        serve(app, emitter)
    else:
        with pytest.raises(LookupError, match="in the middle"):
            serve(app, emitter)
    assert statuses(recorded) == (["200"], ["200"])


def test_an_exception_after_the_last_byte_is_not_a_status(emitter: Emitter, recorded: Recorder) -> None:
    with pytest.raises(LookupError):
        serve(sends(START, LAST, error=LookupError("in a background task")), emitter)
    assert statuses(recorded) == (["200"], [])


def test_a_file_is_a_200_if_the_server_sends_it(emitter: Emitter, recorded: Recorder, tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(b"x" * 100)

    async def photo(request: Request) -> FileResponse:
        return FileResponse(tmp_path / "photo")

    app = asgi.AnalyticsMiddleware(Starlette(routes=[Route("/photo", photo)]), emitter=emitter)
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {
        "type": "http", "method": "GET", "path": "/photo", "headers": [], "query_string": b"", "root_path": "",
        "extensions": {"http.response.pathsend": {}},
    }  # fmt: skip
    asyncio.run(app(scope, None, send))  # type: ignore[arg-type]
    assert sent == ["http.response.start", "http.response.pathsend"]
    assert labels(recorded) == [("/photo", "GET", "200")]


def test_an_upload_that_the_client_aborts_is_a_499_whatever_is_answered_then(
    emitter: Emitter, recorded: Recorder
) -> None:
    async def upload(request: Request) -> PlainTextResponse:
        await request.body()
        return PlainTextResponse("kept")

    app = Starlette(routes=[Route("/upload", upload, methods=["POST"])])
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    half = {"type": "http.request", "body": b"half", "more_body": True}
    messages = iter([half, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        """Send to a closed connection, like servers."""

    scope = {"type": "http", "method": "POST", "path": "/upload", "headers": [], "query_string": b""}
    with pytest.raises(ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    assert labels(recorded) == [("/upload", "POST", "499")]
    assert not labels(recorded, "api_request_error_count")


def test_a_client_that_is_gone_while_it_is_sent_to_is_a_499(emitter: Emitter, recorded: Recorder) -> None:
    with pytest.raises(OSError, match="connection reset"):
        serve(sends(START, LAST), emitter, breaks=True)
    assert statuses(recorded) == (["499"], [])


@pytest.mark.parametrize(("length", "status"), [(b"10", "200"), (b"11", "499")])
def test_a_client_that_leaves_with_the_last_of_the_announced_bytes_has_them(
    emitter: Emitter, recorded: Recorder, length: bytes, status: str
) -> None:
    """Quart announces the length and sends an empty piece at the end, which its clients do not wait for."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({**START, "headers": [(b"Content-Length", length)]})
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"x" * 5, "more_body": True})
        await receive()
        await send({"type": "http.response.body", "body": b""})

    serve(app, emitter, arrives=[{"type": "http.disconnect"}])
    assert statuses(recorded) == ([status], [])


def test_a_cancellation_by_an_outer_timeout_is_the_servers(emitter: Emitter, recorded: Recorder) -> None:
    async def waits(*_: Any) -> None:
        await asyncio.Event().wait()

    async def request() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        async with asyncio.timeout(0.01):
            await asgi.AnalyticsMiddleware(waits, emitter=emitter)(scope, None, None)  # type: ignore[arg-type]

    with pytest.raises(TimeoutError):
        asyncio.run(request())
    assert statuses(recorded) == (["500"], ["500"])


def test_a_timeout_in_a_middleware_is_what_it_answers(emitter: Emitter, recorded: Recorder) -> None:
    class Timeout:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            try:
                async with asyncio.timeout(0.01):
                    await self.app(scope, receive, send)
            except TimeoutError:
                await PlainTextResponse("too slow", status_code=503)(scope, receive, send)

    async def waits(request: Request) -> PlainTextResponse:
        await asyncio.Event().wait()
        return PlainTextResponse("never")

    app = Starlette(routes=[Route("/waits", waits)])
    app.add_middleware(asgi.AnalyticsMiddleware, emitter=emitter)
    app.add_middleware(Timeout)  # outside of it, as it was written
    with TestClient(app) as client:
        assert client.get("/waits").status_code == 503
    assert labels(recorded) == [("/waits", "GET", "503")]


# ---- WSGI -------------------------------------------------------------------------------------------


class Server(SimpleHandler):
    """Python's own WSGI server on two byte strings: it has a file wrapper and counts the pieces."""

    wsgi_file_wrapper = FileWrapper
    sends_files = False
    result: Any
    http_version = "1.0"

    def __init__(self) -> None:
        self.output = io.BytesIO()
        environ: dict[str, str] = {}
        setup_testing_defaults(environ)
        super().__init__(io.BytesIO(), self.output, io.StringIO(), environ)

    def sendfile(self) -> bool:
        self.sends_files = isinstance(self.result, self.wsgi_file_wrapper)
        return False

    def error_output(self, environ: Any, start_response: Any) -> list[bytes]:
        start_response("500 Internal Server Error", [], sys.exc_info())
        return [b""]


def answer(emitter: Emitter, app: Any) -> tuple[str, Server]:
    server = Server()
    server.run(wsgi.AnalyticsMiddleware(app, emitter=emitter))
    return server.output.getvalue().decode(), server


def test_a_response_of_one_piece_keeps_its_length(emitter: Emitter, recorded: Recorder) -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"hello"]

    sent, _ = answer(emitter, app)
    assert "Content-Length: 5" in sent
    assert sent.endswith("hello")
    assert statuses(recorded) == (["200"], [])


@pytest.mark.parametrize(("length", "status"), [("5", "200"), ("6", "499")])
def test_a_server_that_counts_the_bytes_may_ask_for_no_more(
    emitter: Emitter, recorded: Recorder, length: str, status: str
) -> None:
    def app(environ: Any, start: Any) -> Iterator[bytes]:
        start("200 OK", [("Content-Length", length)])
        yield b"hello"

    response = wsgi.AnalyticsMiddleware(app, emitter=emitter)({"REQUEST_METHOD": "GET"}, lambda *_: None)
    next(iter(response))
    response.close()  # type: ignore[attr-defined]  # as servers do
    assert statuses(recorded) == ([status], [])


def test_a_stream_gets_no_length(emitter: Emitter, recorded: Recorder) -> None:
    def app(environ: Any, start: Any) -> Iterator[bytes]:
        start("200 OK", [])
        yield b"hello"

    assert "Content-Length" not in answer(emitter, app)[0]
    assert statuses(recorded) == (["200"], [])


def test_the_servers_own_file_wrapper_reaches_it(emitter: Emitter, recorded: Recorder) -> None:
    closed = []

    class File(io.BytesIO):
        def close(self) -> None:
            closed.append(self)
            super().close()

    def app(environ: Any, start: Any) -> Any:
        start("200 OK", [])
        return environ["wsgi.file_wrapper"](File(b"photo"))

    sent, server = answer(emitter, app)
    assert server.sends_files
    assert sent.endswith("photo")
    assert len(closed) == 1
    assert statuses(recorded) == (["200"], [])


def test_a_file_that_the_server_recognizes_by_itself_is_left_as_it_is(
    emitter: Emitter, recorded: Recorder
) -> None:
    """The wrapper of uWSGI is a function that returns the file, which it compares with the application's result."""

    class File:
        __slots__ = ()

        def read(self) -> bytes:
            return b""

    file = File()

    def app(environ: Any, start: Any) -> Any:
        start("200 OK", [])
        return environ["wsgi.file_wrapper"](file)

    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "wsgi.file_wrapper": lambda file: file}
    assert wsgi.AnalyticsMiddleware(app, emitter=emitter)(environ, lambda *_: None) is file  # type: ignore[comparison-overlap]
    assert statuses(recorded) == (["200"], [])


def test_an_application_that_fails_before_its_first_byte_is_a_500_whatever_it_began(
    emitter: Emitter, recorded: Recorder
) -> None:
    def app(environ: Any, start: Any) -> Iterator[bytes]:
        start("200 OK", [])
        raise LookupError("the application's own")
        yield b""

    sent, _ = answer(emitter, app)
    assert sent.startswith("HTTP/1.0 500")
    assert statuses(recorded) == (["500"], ["500"])


def test_an_application_that_fails_after_its_first_byte_has_the_status_that_was_sent(
    emitter: Emitter, recorded: Recorder
) -> None:
    def app(environ: Any, start: Any) -> Iterator[bytes]:
        start("200 OK", [])
        yield b"half"
        raise LookupError("the application's own")

    sent, _ = answer(emitter, app)
    assert sent.startswith("HTTP/1.0 200")
    assert statuses(recorded) == (["200"], ["200"])


def test_an_application_that_answers_an_error_instead_has_that_status(
    emitter: Emitter, recorded: Recorder
) -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        start("503 Busy", [], (LookupError, LookupError("the application's own"), None))
        return [b"busy"]

    sent, _ = answer(emitter, app)
    assert sent.startswith("HTTP/1.0 503")
    assert statuses(recorded) == (["503"], ["503"])


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200"), ("GET", "304"), ("GET", "204")])
def test_a_server_may_close_a_response_without_a_body_at_once(
    emitter: Emitter, recorded: Recorder, method: str, status: str
) -> None:
    def app(environ: Any, start: Any) -> Iterator[bytes]:
        start(f"{status} X", [])
        return iter([b""])

    response = wsgi.AnalyticsMiddleware(app, emitter=emitter)({"REQUEST_METHOD": method}, lambda *_: None)
    response.close()  # type: ignore[attr-defined]  # as servers do
    assert statuses(recorded) == ([status], [])


def test_a_server_that_knows_the_number_of_pieces_may_ask_for_no_more(
    emitter: Emitter, recorded: Recorder
) -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"hello"]

    response = wsgi.AnalyticsMiddleware(app, emitter=emitter)({"REQUEST_METHOD": "GET"}, lambda *_: None)
    next(iter(response))
    response.close()  # type: ignore[attr-defined]  # as servers do
    assert statuses(recorded) == (["200"], [])


class Upload(io.RawIOBase):
    """The input of a server whose client sends half of the announced bytes."""

    def __init__(self, sent: bytes, error: bool) -> None:
        self._sent = io.BytesIO(sent)
        self._error = error

    def read(self, size: int = -1) -> bytes:
        data = self._sent.read(size)
        if self._error and not data:
            raise ConnectionResetError
        return data

    def readline(self, size: int | None = -1) -> bytes:
        return self._sent.readline(size or -1)


READS: dict[str, Callable[[Any], Any]] = {
    "at once": lambda stream: stream.read(),
    "the length": lambda stream: stream.read(10),
    "in pieces": lambda stream: list(iter(lambda: stream.read(3), b"")),
    "by lines": list,
    "all lines": lambda stream: stream.readlines(),
}


@pytest.mark.parametrize("error", [False, True], ids=["end", "error"])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
@pytest.mark.parametrize(("sent", "status"), [(b"123456", "499"), (b"1234567890", "201")])
def test_an_upload_under_wsgi_that_the_client_aborts_is_a_499(
    emitter: Emitter, recorded: Recorder, read: Callable[[Any], Any], sent: bytes, status: str, error: bool
) -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        with suppress(ConnectionResetError):
            read(environ["wsgi.input"])
        start("201 Created", [])
        return []

    environ = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "10", "wsgi.input": Upload(sent, error)}
    list(wsgi.AnalyticsMiddleware(app, emitter=emitter)(environ, lambda *_: None))
    assert statuses(recorded) == ([status], [])


@pytest.mark.parametrize("length", ["", "0", "10", "x"])
def test_an_application_need_not_read_what_it_is_sent(
    emitter: Emitter, recorded: Recorder, length: str
) -> None:
    def app(environ: Any, start: Any) -> list[bytes]:
        assert environ["wsgi.input"].read(2) == b"12"
        start("201 Created", [])
        return []

    environ = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": length, "wsgi.input": io.BytesIO(b"1234567890")}
    list(wsgi.AnalyticsMiddleware(app, emitter=emitter)(environ, lambda *_: None))
    assert statuses(recorded) == (["201"], [])
