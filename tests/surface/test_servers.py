"""The status and label of 13 kinds of request, per framework and server, compared with the client's view."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.processes import HANGS_AFTER, environment, eventually, free_port

BIN = Path(sys.executable).parent
JSON = {"Content-Type": "application/json"}
PREFLIGHT = {"Origin": "https://family.example", "Access-Control-Request-Method": "GET"}


@dataclass(frozen=True)
class Kind:
    """A kind of request, and the label of its endpoint."""

    path: str
    label: str
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


KINDS = {
    "a parameter": Kind("/items/007", "ITEMS"),
    "only the head": Kind("/items/7", "ITEMS", "HEAD"),
    "no route": Kind("/anything-unmatched", "unmatched"),
    "another method": Kind("/items/7", "ITEMS", "DELETE"),
    "an unhandled exception": Kind("/fails", "/fails"),
    "an error of the application": Kind("/gone", "/gone"),
    "a file": Kind("/file", "/file"),
    "a stream": Kind("/stream", "/stream"),
    "a stream that breaks": Kind("/broken", "/broken"),
    "a body": Kind("/posted", "/posted", "POST", JSON, b'{"x": 1}'),
    "a redirect": Kind("/moved", "/moved"),
    "a preflight": Kind("/items/7", "preflight", "OPTIONS", PREFLIGHT),
    "an answer of a middleware": Kind("/items/7?locked=1", "middleware"),
}
"""12 and one that servers treat in different ways."""

ITEMS = {
    "starlette": "/items/{item}", "fastapi": "/items/{item}", "litestar": "/items/{item}",
    "quart": "/items/<int:item>", "flask": "/items/<int:item>", "django": "/items/<int:item>",
}  # fmt: skip
EXCEPTIONS = {
    # Their functions before a request run after the route was found; Litestar's site has no such middleware.
    ("quart", "an answer of a middleware"): "/items/<int:item>",
    ("flask", "an answer of a middleware"): "/items/<int:item>",
    ("litestar", "an answer of a middleware"): "/items/{item}",
    # Litestar looks for path and method at once.
    ("litestar", "another method"): "unmatched",
    ("litestar", "only the head"): "unmatched",
}


@dataclass(frozen=True)
class Server:
    """A server and its command line."""

    command: Callable[[int], list[str]]
    interface: str
    module: str


def _asgi(module: str, *arguments: str) -> Server:
    return Server(lambda port: [each.format(port=port) for each in arguments], "asgi", module)


def _wsgi(module: str, *arguments: str) -> Server:
    return Server(lambda port: [each.format(port=port) for each in arguments], "wsgi", module)


SERVERS = {
    "uvicorn": _asgi("uvicorn", "uvicorn", "{{app}}", "--port={port}", "--log-level=critical"),
    "hypercorn": _asgi("hypercorn", "hypercorn", "{{app}}", "--bind=127.0.0.1:{port}"),
    "granian": _asgi("granian", "granian", "{{app}}", "--interface=asgi", "--port={port}"),
    "gunicorn with uvicorn": _asgi(
        "gunicorn", "gunicorn", "{{app}}", "--bind=127.0.0.1:{port}", "--worker-class=uvicorn.workers.UvicornWorker",
    ),
    "gunicorn with its own ASGI": _asgi(
        "gunicorn", "gunicorn", "{{app}}", "--bind=127.0.0.1:{port}", "--worker-class=asgi",
    ),
    "gunicorn": _wsgi("gunicorn", "gunicorn", "{{app}}", "--bind=127.0.0.1:{port}"),
    "gunicorn with threads": _wsgi("gunicorn", "gunicorn", "{{app}}", "--bind=127.0.0.1:{port}", "--threads=2"),
    "waitress": _wsgi("waitress", "waitress-serve", "--listen=127.0.0.1:{port}", "{{app}}"),
    "granian with WSGI": _wsgi("granian", "granian", "{{app}}", "--interface=wsgi", "--port={port}"),
    "uWSGI": _wsgi(
        "uwsgi", "uwsgi", "--http-socket=127.0.0.1:{port}", "--module={{app}}", "--enable-threads", "--die-on-term",
        "--need-app",
    ),
}  # fmt: skip
SHORT = {"uvicorn", "waitress"}
"""One of each interface in the default run: each start takes seconds, of which most import the frameworks."""


class Site:
    """A running server and the metrics of its requests."""

    def __init__(self, port: int, spool: Path) -> None:
        self.port = port
        self._spool = spool

    def requests(self) -> list[tuple[str, str, str]]:
        """Return endpoint, method and status of all requests so far."""
        files = [*self._spool.glob("*.ndjson"), *self._spool.glob("*.open")]
        try:
            found = [line for file in sorted(files) for line in file.read_bytes().split(b"\n")[:-1]]
        except FileNotFoundError:  # one was sealed, which renames it
            return self.requests()
        labels = [orjson.loads(line)["labels"] for line in found if b'"api_request_count"' in line]
        return [(each["endpoint"], each["method"], each["status"]) for each in labels]

    def send(self, framework: str, kind: Kind) -> tuple[str, str | None]:
        """Return the status received by the client, and the id of the request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANGS_AFTER)
        headers = {"X-Framework": framework, "X-Request-ID": "r1", **kind.headers}
        connection.request(kind.method, kind.path, kind.body, headers)
        answer = connection.getresponse()
        with suppress(http.client.IncompleteRead, ConnectionError):  # of an aborted body
            answer.read()
        connection.close()
        return str(answer.status), answer.getheader("X-Request-ID")

    def seen(self, before: int) -> tuple[str, str, str]:
        """Wait for the metrics of one more request."""
        eventually(lambda: len(self.requests()) > before, 30)
        (one,) = self.requests()[before:]
        return one


@contextmanager
def serving(server: Server, home: Path) -> Iterator[Site]:
    port, spool = free_port(), home / "spool"
    command = [each.format(app="tests.surface.sites:app") for each in server.command(port)]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [BIN / command[0], *command[1:]],
            env=environment(
                SITE=str(home), INTERFACE=server.interface, SPOOL_DIR=str(spool), SPOOL_SEGMENT_BYTES="65536", PYTHONPATH=str(Path.cwd()), PYTHONWARNINGS="ignore",
                VIRTUAL_ENV=sys.prefix,
            ),
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            eventually(lambda: process.poll() is not None or answers(port), 60)
            assert process.poll() is None, (home / "log").read_text()
            yield Site(port, spool)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    """Whether it responds to a request that belongs to no framework, and so is not counted."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS_AFTER)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        return isinstance(error, http.client.RemoteDisconnected)
    finally:
        connection.close()
    return True


def frameworks(interface: str) -> list[str]:
    wanted = (
        ["starlette", "fastapi", "litestar", "quart", "django"]
        if interface == "asgi"
        else ["flask", "django"]
    )
    return [each for each in wanted if find_spec(each) is not None]


def servers(interface: str | None = None) -> list[Any]:
    return [
        name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
        for name, server in SERVERS.items() if interface in {None, server.interface}
    ]  # fmt: skip


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Site]]:
    server = SERVERS[request.param]
    if find_spec(server.module) is None and not (BIN / server.module).exists():
        pytest.skip(f"{server.module} is not installed")
    with serving(server, tmp_path_factory.mktemp("site")) as site:
        yield server, site


@pytest.mark.parametrize("running", servers(), indirect=True)
def test_every_status_and_label_is_what_the_client_saw(running: tuple[Server, Site]) -> None:
    server, site = running
    wrong = []
    for framework in frameworks(server.interface):
        for name, kind in KINDS.items():
            before = len(site.requests())
            status, identifier = site.send(framework, kind)
            label = EXCEPTIONS.get((framework, name), kind.label).replace("ITEMS", ITEMS[framework])
            expected = label, kind.method, status
            if (seen := site.seen(before)) != expected or identifier != "r1":
                wrong.append((framework, name, expected, seen, identifier))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("running", servers(), indirect=True)
def test_an_upload_that_the_client_aborts_is_a_499(running: tuple[Server, Site]) -> None:
    server, site = running
    if server.module in {"waitress", "granian"} and server.interface == "wsgi":
        pytest.skip("the server reads the whole body before it calls the application")
    seen = {}
    for framework in frameworks(server.interface):
        before = len(site.requests())
        with socket.create_connection(("127.0.0.1", site.port)) as client:
            head = f"POST /posted HTTP/1.1\r\nHost: x\r\nX-Framework: {framework}\r\nContent-Length: 1000\r\n"
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + b"half of it")
        seen[framework] = site.seen(before)
    assert seen == dict.fromkeys(seen, ("/posted", "POST", "499"))


@pytest.mark.parametrize("path", ["/nothing", "/cancelled"])
@pytest.mark.parametrize("running", servers("asgi"), indirect=True)
def test_an_application_without_an_answer_and_one_that_a_timeout_ends_are_a_500(
    running: tuple[Server, Site], path: str
) -> None:
    _, site = running
    before = len(site.requests())
    status, _ = site.send("bare", Kind(path, "unmatched"))
    assert site.seen(before) == ("unmatched", "GET", "500")
    assert status == "500"
