"""Metadata added to an event: extra keys, trace ids and process-wide defaults."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spool import Emitter, asgi, wsgi
from spool.context import bind, carried, current, scope, update
from spool.request import trace_id
from spool.testing import record

WHO: dict[str, Any] = {"user_id": uuid.UUID(int=1), "family_unit_id": uuid.UUID(int=2)}
DEFAULTS: dict[str, Any] = {"service": "api", "release": "1.2", "environment": "Test"}
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    with closing(Emitter(tmp_path)) as made:
        yield made


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Emitter]:
    with closing(Emitter(tmp_path, **DEFAULTS)) as made:
        yield made


def emitted(emitter: Emitter, **given: Any) -> Any:
    with record(emitter) as recorder:
        emitter.emit_event(event_type="made", **given)
    (event,) = recorder.events
    return event["metadata"]


# ---- extra ----------------------------------------------------------------------------------------------


def test_extra_keys_are_in_the_metadata_and_an_events_own_key_wins(emitter: Emitter) -> None:
    with bind(**WHO, role="parent", extra={"plan": "pro", "seats": 3}):
        assert emitted(emitter) == {"plan": "pro", "seats": 3, "role": "parent"}
        assert emitted(emitter, metadata={"plan": "free"})["plan"] == "free"
        update(extra={"tenant": "t"})
        assert emitted(emitter) == {"plan": "pro", "seats": 3, "tenant": "t", "role": "parent"}
        with bind(extra={"plan": "free"}):
            assert emitted(emitter)["plan"] == "free"
        assert emitted(emitter)["plan"] == "pro"
        update(extra=None)
        assert emitted(emitter) == {"role": "parent"}


def test_extra_keys_do_not_replace_the_role_or_the_request_id(emitter: Emitter) -> None:
    with bind(**WHO, role="parent", request_id="r", extra={"role": "admin", "request_id": "x"}):
        assert emitted(emitter) == {"role": "parent", "request_id": "r"}


def test_extra_keys_are_redacted(emitter: Emitter) -> None:
    with bind(**WHO, extra={"email": "a@b.c", "plan": "pro"}):
        assert emitted(emitter) == {"email": "[redacted]", "plan": "pro"}


def test_a_dictionary_that_changes_later_changes_nothing_that_is_bound(emitter: Emitter) -> None:
    given = {"plan": "pro"}
    with bind(**WHO, extra=given):
        given["plan"] = "free"
        assert emitted(emitter) == {"plan": "pro"}


def test_a_wrong_name_or_an_extra_that_is_no_mapping_is_a_type_error() -> None:
    for given in ({"user": 1}, {"extra": "plan"}, {"extra": 3}):
        for call in (bind, scope):
            with pytest.raises(TypeError), call(**given):
                pass
        with scope(), pytest.raises(TypeError):
            update(**given)


def test_extra_keys_and_the_trace_travel_with_a_job_as_json() -> None:
    with bind(extra={"plan": "pro", "path": Path("/x"), "own": object()}, trace_id=TRACE):
        values = carried()
    assert values == {"trace_id": TRACE, "extra": {"plan": "pro", "path": "/x", "own": "object"}}
    with scope(**values):
        assert carried() == values


# ---- defaults -------------------------------------------------------------------------------------------


def test_defaults_are_in_every_event_bound_or_not(named: Emitter) -> None:
    assert emitted(named, **WHO) == DEFAULTS
    assert emitted(named, **WHO, metadata={"a": 1}) == {"a": 1} | DEFAULTS
    assert emitted(named, **WHO, metadata={"service": "other"})["service"] == "other"
    with bind(**WHO, request_id="r"):
        assert emitted(named) == DEFAULTS | {"request_id": "r"}
        assert emitted(named, metadata={"a": 1}) == DEFAULTS | {"request_id": "r", "a": 1}
        assert emitted(named, metadata={"release": None})["release"] is None
        update(request_id="s")
        assert emitted(named) == DEFAULTS | {"request_id": "s"}
        assert emitted(named, user_id=uuid.UUID(int=9)) == DEFAULTS | {"request_id": "s"}


def test_defaults_belong_to_their_emitter(named: Emitter, emitter: Emitter) -> None:
    with bind(**WHO, role="child"):
        for _ in range(2):
            assert emitted(named) == DEFAULTS | {"role": "child"}
            assert emitted(emitter) == {"role": "child"}


def test_defaults_are_in_the_labels_of_metrics(named: Emitter) -> None:
    with record(named) as recorder:
        named.increment_counter(metric_name="a")
        named.record_gauge(metric_name="b", value=1, labels={"service": "own", "k": "v"})
    assert recorder.of("a")[0]["labels"] == DEFAULTS
    assert recorder.of("b")[0]["labels"] == DEFAULTS | {"service": "own", "k": "v"}


def test_defaults_are_beside_what_a_hook_returns(tmp_path: Path) -> None:
    with closing(Emitter(tmp_path, service="api", before_emit=lambda event: event)) as hooked:
        assert emitted(hooked, **WHO, metadata={"a": 1}) == {"a": 1, "service": "api"}


def test_a_default_under_a_word_to_redact_is_redacted(tmp_path: Path) -> None:
    with closing(Emitter(tmp_path, service="api", redact=["service"])) as made, bind(**WHO):
        assert emitted(made) == {"service": "[redacted]"}


def test_defaults_come_from_the_environment_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in DEFAULTS.items():
        monkeypatch.setenv(f"SPOOL_{name.upper()}", value)
    with closing(Emitter(tmp_path)) as made:
        assert emitted(made, **WHO) == DEFAULTS
    monkeypatch.setenv("SPOOL_RELEASE", "x" * 201)
    with pytest.raises(ValueError, match=r"^SPOOL_RELEASE must be at most"):
        Emitter(tmp_path)


@pytest.mark.parametrize("value", [3, "\0", "\ud800", "x" * 201])
def test_a_default_that_postgres_cannot_store_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^service must be"):
        Emitter(tmp_path, service=value)


# ---- trace ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header", [f"00-{TRACE}-{SPAN}-01", f" 00-{TRACE}-{SPAN}-00 ", f"cc-{TRACE}-{SPAN}-01-what-comes-later"]
)
def test_a_traceparent_has_a_trace_id(header: str) -> None:
    assert trace_id(header) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        None, "", "x", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}", f"00-{TRACE}-{SPAN}-01more",
    ],
)  # fmt: skip
def test_an_invalid_traceparent_has_none(header: str | None) -> None:
    assert trace_id(header) is None


def test_the_current_span_comes_before_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    assert trace_id(f"00-{TRACE}-{SPAN}-01") == TRACE  # imported, but without a span
    context = trace.SpanContext(5, 6, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert trace_id(f"00-{TRACE}-{SPAN}-01") == f"{5:032x}"


def test_an_opentelemetry_that_fails_leaves_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", SimpleNamespace())
    assert trace_id(f"00-{TRACE}-{SPAN}-01") == TRACE


def test_a_wsgi_request_has_the_trace_of_its_header(emitter: Emitter) -> None:
    seen: list[Any] = []

    def app(_environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        seen.append(current().trace_id)
        start("200 OK", [])
        return [b""]

    wrapped = wsgi.AnalyticsMiddleware(app, emitter=emitter)
    list(wrapped({"PATH_INFO": "/", "HTTP_TRACEPARENT": f"00-{TRACE}-{SPAN}-01"}, lambda *_: None))
    list(wrapped({"PATH_INFO": "/"}, lambda *_: None))
    assert seen == [TRACE, None]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_an_asgi_request_has_the_trace_of_its_header(emitter: Emitter, kind: str) -> None:
    import asyncio

    seen: list[Any] = []

    async def app(_scope: asgi.Message, _receive: asgi.Receive, _send: asgi.Send) -> None:
        seen.append(current().trace_id)

    async def receive() -> asgi.Message:
        return {"type": "http.disconnect"}

    async def send(_message: asgi.Message) -> None:
        pass

    wrapped = asgi.AnalyticsMiddleware(app, emitter=emitter)
    for headers in ([(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())], []):
        request: dict[str, Any] = {"type": kind, "path": "/", "method": "GET", "headers": headers}
        asyncio.run(wrapped(request, receive, send))
    assert seen == [TRACE, None]
