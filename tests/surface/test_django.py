"""`spool.django.AnalyticsMiddleware` in MIDDLEWARE, with Django's own clients, in separate processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from spool import analytics_uuid
from tests.processes import HANGS_AFTER, environment

pytest.importorskip("django")

SITE = "tests.surface.django_site"
ANNA = str(UUID(int=7))
FAMILY = "0190163d-8694-739b-aea5-966c26f8ad92"

SYNC = """
from spool import get_emitter
from django.test import Client
client = Client(raise_request_exception=False)
def get(path, **more):
    answer = client.get(path, **more)
    return answer.status_code, b"".join(answer) if answer.streaming else answer.content, dict(answer.headers)
"""
ASYNC = """
from spool import get_emitter
from spool import get_emitter
import asyncio
from django.test import AsyncClient
client = AsyncClient(raise_request_exception=False)
async def _get(path, **more):
    answer = await client.get("/async" + path if path in NATIVE else path, **more)
    if answer.streaming:
        pieces = [piece async for piece in answer] if answer.is_async else list(answer)
        await asyncio.to_thread(answer.close)
        return answer.status_code, b"".join(pieces), dict(answer.headers)
    return answer.status_code, answer.content, dict(answer.headers)
def get(path, **more):
    return asyncio.run(_get(path, **more))
NATIVE = {"/items/007", "/stream", "/in", "/out"}
"""


class Site:
    """A process that runs each case in a separate child, so that Django is started only once."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._cases = 0
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", "from tests.surface import django_site as site; site.serve_cases()"],
            env=environment(SITE=str(home), SPOOL_DIR=str(home / "spool")),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, script: str, middleware: list[str] | None = None, **options: Any) -> dict[str, Any]:
        """Run a script; return its records, its `result`, and its log."""
        self._cases += 1
        file = self._home / f"{self._cases}.json"
        settings: dict[str, Any] = {"SPOOL": options}
        if middleware is not None:
            settings["MIDDLEWARE"] = middleware
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case = {"script": script, "file": str(file), "settings": settings}
        print(json.dumps(case), file=self._process.stdin, flush=True)
        self._process.stdout.readline()
        log = file.with_suffix(".log").read_text()
        assert file.exists(), log
        return {**json.loads(file.read_text()), "log": log}

    def close(self) -> None:
        self._process.communicate(timeout=HANGS_AFTER)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with closing(Site(tmp_path_factory.mktemp("site"))) as site:
        yield site


def requests(ended: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        tuple(each["labels"].values())
        for each in ended["records"]
        if each.get("metric_name") == "api_request_count"
    ]


def events(ended: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    return [
        (each["event_type"], each["user_id"], each["metadata"].get("role"))
        for each in ended["records"] if "event_type" in each
    ]  # fmt: skip


@pytest.mark.parametrize("client", [SYNC, ASYNC], ids=["sync", "async"])
def test_requests_are_counted_with_their_templates(run: Site, client: str) -> None:
    prefix = "/async" if client == ASYNC else ""
    kinds = {
        "/items/007": (f"{prefix}/items/<int:item>", "200"),
        "/of/me/08": ("/of/<slug:who>/<int:item>", "200"),
        "/years/1999": ("/^years/(?P<item>[0-9]{4})$", "200"),
        "/anything-unmatched": ("unmatched", "404"),
        "/of/me": ("unmatched", "404"),
        "/items/7?locked": ("middleware", "418"),
        "/fails": ("/fails", "500"),
        "/stream": (f"{prefix}/stream", "200"),
        "/file": ("/file", "200"),
    }
    ended = run(
        f"{client}\nresult = [get(path, headers={{'X-Request-ID': 'r1'}}) for path in {list(kinds)}]\n"
        "get('/health/live'); get('/')\n"
        "client.cookies.clear()",
        EXCLUDE=["/health", "/"],
    )
    assert requests(ended) == [(label, "GET", status) for label, status in kinds.values()]
    assert [str(answer[0]) for answer in ended["result"]] == [status for _, status in kinds.values()]
    assert all(answer[2]["X-Request-ID"] == "r1" for answer in ended["result"])


def test_preflights_and_own_labels(run: Site) -> None:
    script = f"""{SYNC}
client.options("/typed", headers={{"Origin": "x", "Access-Control-Request-Method": "GET"}})
client.options("/items/7")
list(client.post("/file"))
"""
    ended = run(script, ENDPOINT=f"{SITE}.emit")
    assert requests(ended) == [
        ("preflight", "OPTIONS", "404"), ("/items/<int:item>", "OPTIONS", "200"), ("/file", "POST", "200")
    ]  # fmt: skip


@pytest.mark.parametrize("client", [SYNC, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("function", ["user", "user_async"])
def test_the_user_is_bound_for_the_view_and_the_stream_and_no_longer(
    run: Site, client: str, function: str
) -> None:
    script = f"{client}\nget('/in'); get('/items/007'); get('/stream'); client.cookies.clear(); get('/items/007')\nresult = get_emitter().stats().dropped"
    ended = run(script, USER=f"{SITE}.{function}", LOGIN_EVENTS=True)
    role = "parent" if function == "user" else None
    names = ["user_logged_in", "came", "item_viewed", "piece_sent", "piece_sent", "piece_sent"]
    assert events(ended) == [(name, ANNA, role) for name in names]
    assert ended["result"] == {"missing": 1}  # nobody is logged in


@pytest.mark.parametrize("client", [SYNC, ASYNC], ids=["sync", "async"])
def test_logins_and_logouts_are_events_if_wanted(run: Site, client: str) -> None:
    script = f"{client}\nget('/in'); get('/out'); get('/out')"
    ended = run(script, USER=f"{SITE}.user", LOGIN_EVENTS=True)
    assert events(ended) == [
        ("user_logged_in", ANNA, "parent"), ("came", ANNA, "parent"), ("user_logged_out", ANNA, "parent")
    ]  # fmt: skip
    ended = run(f"{client}\nget('/in'); get('/out')")
    assert events(ended) == []


def test_a_login_without_a_request_of_the_site_is_an_event(run: Site) -> None:
    script = f"""{SYNC}
from django.contrib.auth.models import User
client.get("/items/7")
client.force_login(User.objects.get())
get("/items/7")
"""
    ended = run(script, USER=f"{SITE}.user", LOGIN_EVENTS=True)
    assert events(ended) == [("user_logged_in", ANNA, "parent"), ("item_viewed", ANNA, "parent")]


def test_true_is_the_authenticated_user(run: Site) -> None:
    script = f"""{SYNC}
from django.contrib.auth.models import User
User.family_unit_id = 3
client.force_login(User.objects.get())
get("/items/7")
"""
    ended = run(script, USER=True)
    (event,) = [each for each in ended["records"] if "event_type" in each]
    assert event["user_id"] == str(analytics_uuid("user", 7))
    assert event["family_unit_id"] == str(analytics_uuid("family", 3))


def test_a_function_of_the_user_that_fails_fails_no_request(run: Site) -> None:
    ended = run(f"{SYNC}\nresult = get('/hand')[0]", USER=f"{SITE}.user_fails")
    assert ended["result"] == 200
    assert events(ended) == [("item_viewed", FAMILY, None)]
    assert "LookupError: the application's own" in ended["log"]


def test_it_binds_and_a_middleware_around_the_site_measures(run: Site) -> None:
    script = f"""{SYNC}
from spool import wsgi
client.handler = None
from django.core.wsgi import get_wsgi_application
from werkzeug.test import Client as Werkzeug
site = Werkzeug(wsgi.AnalyticsMiddleware(get_wsgi_application()))

answers = [site.get(path) for path in ("/hand", "/items/7?locked", "/typed")]
result = [answer.headers.getlist("X-Request-ID") for answer in answers if answer.get_data()]
"""
    ended = run(script, middleware=["spool.django.AnalyticsMiddleware"] * 2 + [f"{SITE}.guard"])
    assert requests(ended) == [
        ("/hand", "GET", "200"),
        ("middleware", "GET", "418"),
        ("unmatched", "GET", "404"),
    ]
    assert [len(each) for each in ended["result"]] == [1, 1]
    assert events(ended) == [("item_viewed", FAMILY, None)]


def test_a_client_that_leaves_a_stream_is_a_499(run: Site) -> None:
    script = f"""{SYNC}
answer = client.get("/stream")
next(iter(answer))
answer.close()
"""
    assert requests(run(script)) == [("/stream", "GET", "499")]


@pytest.mark.parametrize(
    "options",
    [
        {"EXCLUDE": "/health"},
        {"USER": 7},
        {"USER": "no.such.function"},
        {"ENDPOINT": []},
        {"LOGIN_EVENT": True},
    ],
)
def test_impossible_settings_are_refused_at_the_start(run: Site, options: dict[str, Any]) -> None:
    script = """
from django.core.exceptions import ImproperlyConfigured
from django.core.wsgi import get_wsgi_application
try:
    get_wsgi_application()
except ImproperlyConfigured as error:
    result = str(error)
"""
    assert run(script, **options)["result"].startswith("SPOOL")
