"""Sampled request timers: fewer lines, exact counts, and averages and percentiles without a bias."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from loader.load.database import Connection
from spool import Emitter, asgi
from spool.request import RequestTimer
from spool.testing import record
from tests.load.lines import number, rows
from tests.processes import Cli, environment
from tests.see.data import refresh

COUNT, DURATION, ERRORS = "api_request_count", "api_request_duration_ms", "api_request_error_count"
RATE = 0.1
DEVIATIONS = 5
"""Standard deviations that chance may cause: once in a million runs."""


class Clock:
    """The time of requests, which their application advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.milliseconds = 0
        stopped = SimpleNamespace(
            perf_counter_ns=lambda: self.milliseconds * 1_000_000, time_ns=lambda: 1_700_000_000_000_000_000
        )
        monkeypatch.setattr("spool.request.time", stopped)


def served(emitter: Emitter, clock: Clock, milliseconds: list[int]) -> None:
    """Serve requests that take so long, one after another; every hundredth fails."""
    numbers: Iterator[int] = count()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        each = next(numbers)
        clock.milliseconds += milliseconds[each]
        await send({"type": "http.response.start", "status": 500 if each % 100 == 99 else 200})
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        pass

    async def serve() -> None:
        middleware = asgi.AnalyticsMiddleware(app, emitter=emitter, endpoint=lambda scope: "/photos/{photo}")
        for _ in milliseconds:
            scope = {"type": "http", "method": "GET", "path": "/photos/7", "headers": []}
            await middleware(scope, None, send)  # type: ignore[arg-type]  # nothing is received

    asyncio.run(serve())


def of_a_client_that_takes_turns(requests: int) -> list[int]:
    """Every tenth request, and no other, is slow."""
    rng = random.Random(7)
    return [
        round((500 if each % 10 == 3 else 10) * rng.lognormvariate(0, 0.5)) + 1 for each in range(requests)
    ]


def test_a_sample_has_the_average_and_the_percentiles_of_all_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, took = Clock(monkeypatch), of_a_client_that_takes_turns(20_000)
    emitter = Emitter(tmp_path / "spool", request_timer_rate=RATE)
    with record(emitter) as recorder:
        served(emitter, clock, took)
    sample = [each["value"] for each in recorder.of(DURATION)]

    assert len(recorder.of(COUNT)) == 20_000 and len(recorder.of(ERRORS)) == 200
    assert sum(each["value"] for each in recorder.of(COUNT)) == 20_000
    assert {each["labels"]["sample_rate"] for each in recorder.of(DURATION)} == {RATE}
    assert not any("sample_rate" in each["labels"] for name in (COUNT, ERRORS) for each in recorder.of(name))

    expected = 20_000 * RATE
    assert abs(len(sample) - expected) < DEVIATIONS * math.sqrt(expected * (1 - RATE))
    mean = sum(took) / len(took)
    deviation = math.sqrt(sum((each - mean) ** 2 for each in took) / len(took))
    assert abs(sum(sample) / len(sample) - mean) < DEVIATIONS * deviation / math.sqrt(len(sample))
    for part in (0.5, 0.95):
        percentile = sorted(sample)[int(part * len(sample))]
        rank = sum(each <= percentile for each in took) / len(took)
        assert abs(rank - part) < DEVIATIONS * math.sqrt(part * (1 - part) / len(sample)) + 0.01  # ties


EVERY_MIDDLEWARE = """
import asyncio, sys
from django.conf import settings
from django.http import HttpResponse
from django.test import Client
from django.urls import path
from flask import Flask
from spool import asgi, get_emitter, wsgi
from spool.flask import Analytics
from spool.request import RequestTimer
from spool.testing import record

urlpatterns = [path("django", lambda request: HttpResponse("feed"))]
settings.configure(
    ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x", MIDDLEWARE=["spool.django.AnalyticsMiddleware"]
)

async def application(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})

async def send(message):
    pass

def start(*_):
    pass

with record() as recorder:
    scope = {"type": "http", "method": "GET", "path": "/asgi", "headers": []}
    asyncio.run(asgi.AnalyticsMiddleware(application)(scope, None, send))
    plain = wsgi.AnalyticsMiddleware(lambda environ, start: start("200 OK", []) or [b"feed"])
    list(plain({"REQUEST_METHOD": "GET", "PATH_INFO": "/wsgi"}, start))
    flask = Flask(__name__)
    flask.add_url_rule("/flask", view_func=lambda: "feed")
    Analytics(flask)
    flask.test_client().get("/flask", buffered=True)
    Client().get("/django")
    with get_emitter().timer("album_ms"):
        pass
assert len(recorder.of("api_request_count")) == 4
assert len(recorder.of("album_ms")) == 1, "a timer of the application"
timers = recorder.of("api_request_duration_ms")
assert all(each["labels"].keys() == {"endpoint", "method", "status"} for each in timers), timers
print(len(timers))
"""


@pytest.mark.parametrize(("rate", "timers"), [("", 4), ("1.0", 4), ("1e-12", 0)])
def test_every_middleware_samples_and_only_if_asked(tmp_path: Path, rate: str, timers: int) -> None:
    pytest.importorskip("flask")
    pytest.importorskip("django")
    variables = environment(SPOOL_DIR=str(tmp_path / "spool"), SPOOL_REQUEST_TIMER_RATE=rate)
    command = [sys.executable, "-W", "ignore", "-c", EVERY_MIDDLEWARE]
    ended = subprocess.run(command, env=variables, check=True, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == [str(timers)]


def test_forked_workers_do_not_sample_the_same_requests(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path / "spool", request_timer_rate=0.5)

    def serve() -> None:
        for each in range(64):
            RequestTimer(emitter, "GET").end(f"/{each}", "200")
        emitter.close()

    for _ in range(2):
        if (child := os.fork()) == 0:
            serve()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    lines = [
        list(map(orjson.loads, file.read_bytes().splitlines())) for file in tmp_path.glob("spool/*.ndjson")
    ]
    first, second = (
        {line["labels"]["endpoint"] for line in worker if line["metric_name"] == DURATION} for worker in lines
    )
    assert first != second


WEIGHED = (
    "SELECT sum(value / w) / sum(1 / w), sum(1 / w) FROM (SELECT value, coalesce((labels->>'sample_rate')::numeric, 1) AS w "
    f"FROM analytics_metrics WHERE metric_name = '{DURATION}') timers"
)


def test_a_sampled_endpoint_is_one_row_with_all_requests_also_if_the_rate_has_changed(
    cli: Cli, one_connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, took = Clock(monkeypatch), of_a_client_that_takes_turns(2_000)
    for rate in (None, 0.5):
        emitter = Emitter(cli.spool, request_timer_rate=rate)
        served(emitter, clock, took)
        emitter.close()
    cli("run", "--once")
    timers = number(
        one_connection, f"SELECT count(*) FROM analytics_metrics WHERE metric_name = '{DURATION}'"
    )
    assert 2_000 < timers < 4_000
    ((average, weight),) = rows(one_connection, WEIGHED)
    mean = sum(took) / len(took)
    assert abs(float(average) - mean) < 0.2 * mean and abs(weight - 4_000) < 400

    median = sorted(took)[len(took) // 2]
    for _ in ("from rows", "from rollups"):
        (row,) = json.loads(cli("ask", "requests", "--since", "2h", "--json"))["rows"]
        assert (row["endpoint"], row["requests"], row["errors"]) == ("/photos/{photo}", 4_000, 40)
        assert abs(row["p50"] - median) < 0.2 * median
        refresh(one_connection)
