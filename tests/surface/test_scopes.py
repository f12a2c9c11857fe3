"""An event carries the right person or none: no identity outlives its request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from spool import Emitter, asgi, emitter, wsgi
from spool.context import begin, current, end, in_force, update
from tests.emit.lines import lines, recover_all


def test_update_outside_of_a_scope_binds_nothing_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(Emitter(directory=tmp_path, strict=False)) as lenient:
        monkeypatch.setattr(emitter, "get_emitter", lambda: lenient)
        update(user_id="somebody")
        assert in_force() is None
        assert (lenient.stats().unbound, lenient.stats().dropped) == (1, {})
    (message,) = caplog.messages
    assert "outside of a scope" in message and "1 calls so far" in message
    recover_all(tmp_path)
    assert lines(tmp_path) == [], "no line was emitted, so none is counted as dropped"


def test_update_outside_of_a_scope_is_an_error_in_strict_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Emitter(directory=tmp_path, strict=True)) as strict:
        monkeypatch.setattr(emitter, "get_emitter", lambda: strict)
        with pytest.raises(ValueError, match="outside of a scope"):
            update(user_id="somebody")


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_wsgi_request_begins_with_nobody_and_leaves_nobody(tmp_path: Path, path: str) -> None:
    seen: list[Any] = []

    def app(_environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        seen.append(current().user_id)
        update(user_id="inner")
        start("200 OK", [])
        return [b"x"]

    begun = begin(user_id="previous")
    with closing(Emitter(directory=tmp_path)) as made:
        wrapped = wsgi.AnalyticsMiddleware(app, emitter=made, exclude=("/health",))
        for _ in range(2):
            list(wrapped({"PATH_INFO": path, "REQUEST_METHOD": "GET"}, lambda *_: None))
        assert current().user_id == "previous"
    end(begun)
    assert seen == [None, None]


@pytest.mark.parametrize(("kind", "path"), [("http", "/"), ("http", "/health"), ("websocket", "/")])
def test_an_asgi_request_begins_with_nobody_and_leaves_nobody(tmp_path: Path, kind: str, path: str) -> None:
    seen: list[Any] = []

    async def app(_scope: asgi.Message, _receive: asgi.Receive, _send: asgi.Send) -> None:
        seen.append(current().user_id)
        update(user_id="inner")

    async def receive() -> asgi.Message:
        return {"type": "http.disconnect"}

    async def send(_message: asgi.Message) -> None: ...

    async def serve() -> None:
        begun = begin(user_id="previous")
        with closing(Emitter(directory=tmp_path)) as made:
            wrapped = asgi.AnalyticsMiddleware(app, emitter=made, exclude=("/health",))
            for _ in range(2):
                await wrapped({"type": kind, "path": path, "method": "GET", "headers": []}, receive, send)
            assert current().user_id == "previous"
        end(begun)

    asyncio.run(serve())
    assert seen == [None, None]
