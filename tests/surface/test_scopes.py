"""An event has the right person or none: no identity outlives its request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from spool import Emitter, asgi, emitter, wsgi
from spool.context import begin, current, end, in_force, scope, update
from spool.testing import record
from tests.emit.lines import FAMILY, USER, lines, recover_all


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


async def nothing() -> asgi.Message:
    return {"type": "http.disconnect"}


async def ignored(_: asgi.Message) -> None: ...


def served(tmp_path: Path, app: asgi.Application) -> list[dict[str, Any]]:
    """Return the events of one request."""
    with closing(Emitter(tmp_path, identity="optional")) as made, record(made) as recorder:
        wrapped = asgi.AnalyticsMiddleware(app, emitter=made)
        request: asgi.Message = {"type": "http", "path": "/", "method": "GET", "headers": []}
        asyncio.run(wrapped({**request, "emit": made.emit_event}, nothing, ignored))
    return recorder.events


@pytest.mark.parametrize("concurrent", [True, False])
def test_sibling_tasks_of_one_request_never_mix_users(tmp_path: Path, concurrent: bool) -> None:
    users = [str(uuid.UUID(int=number)) for number in range(1, 6)]

    async def app(scope: asgi.Message, _receive: asgi.Receive, _send: asgi.Send) -> None:
        async def sibling(user: str) -> None:
            scope["emit"](event_type="seen", metadata={"expected": users[0]})
            update(user_id=user)
            for _ in range(3):
                await asyncio.sleep(0)
                await asyncio.to_thread(scope["emit"], event_type="seen", metadata={"expected": user})
                await asyncio.create_task(asyncio.to_thread(update, role="inner"))

        update(user_id=users[0])
        if concurrent:
            await asyncio.gather(*map(sibling, users[1:]))
        else:
            for user in users[1:]:
                await asyncio.create_task(sibling(user))
        scope["emit"](event_type="seen", metadata={"expected": users[0]})

    events = served(tmp_path, app)
    assert len(events) == 4 * len(users[1:]) + 1
    assert [event["user_id"] for event in events] == [event["metadata"]["expected"] for event in events]


def test_a_task_of_a_request_carries_its_own_user_into_its_tasks_and_threads(tmp_path: Path) -> None:
    async def app(scope: asgi.Message, _receive: asgi.Receive, _send: asgi.Send) -> None:
        async def within() -> None:  # like an application behind Starlette's BaseHTTPMiddleware
            await asyncio.to_thread(update, user_id=USER)
            scope["emit"](event_type="seen")
            update(role="parent")
            await asyncio.to_thread(update, session_id=FAMILY)
            await asyncio.create_task(asyncio.to_thread(scope["emit"], event_type="seen"))

        await asyncio.create_task(within())

    first, second = served(tmp_path, app)
    assert first["user_id"] == second["user_id"] == str(USER)
    assert (second["session_id"], second["metadata"]["role"]) == (str(FAMILY), "parent")


def test_a_job_that_runs_an_event_loop_carries_its_user(tmp_path: Path) -> None:
    with closing(Emitter(tmp_path, identity="optional")) as made, record(made) as recorder:

        async def work() -> None:
            made.emit_event(event_type="before")
            update(user_id=FAMILY)
            made.emit_event(event_type="after")

        with scope(user_id=USER):
            asyncio.run(work())
            made.emit_event(event_type="before")
    assert {(event["event_type"], event["user_id"]) for event in recorder.events} == {
        ("before", str(USER)), ("after", str(FAMILY)),
    }  # fmt: skip
