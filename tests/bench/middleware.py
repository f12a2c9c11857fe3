"""Benchmark of the time that middlewares add to a request of a bare Starlette or Flask application.

    python -m tests.bench.middleware [--rounds N]

Each application is called like by a server, in one process, in alternating blocks; the figure is the
difference of the medians to the bare application. The extra `bench` installs the alternatives.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from time import perf_counter_ns
from typing import Any
from wsgiref.util import setup_testing_defaults

from flask import Flask
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from spool import Emitter
from spool.asgi import AnalyticsMiddleware
from spool.wsgi import AnalyticsMiddleware as WsgiMiddleware

BLOCK = 200
Application = Callable[[Any, Any, Any], Awaitable[None]]


async def endpoint(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def bare() -> Starlette:
    return Starlette(routes=[Route("/memories/{memory_id}", endpoint)])


def ours() -> Application:
    return AnalyticsMiddleware(bare(), emitter=Emitter(tempfile.mkdtemp()))


def prometheus() -> Application:
    from prometheus_fastapi_instrumentator import Instrumentator

    app = bare()
    Instrumentator().instrument(app)
    return app


def opentelemetry() -> Application:
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider

    provider = MeterProvider(metric_readers=[InMemoryMetricReader()])
    return OpenTelemetryMiddleware(bare(), tracer_provider=TracerProvider(), meter_provider=provider)


APPLICATIONS: dict[str, Callable[[], Application]] = {
    "bare Starlette": bare,
    "spool.asgi.AnalyticsMiddleware": ours,
    "prometheus-fastapi-instrumentator": prometheus,
    "OpenTelemetry ASGI": opentelemetry,
}


async def block(app: Application) -> list[int]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        pass

    taken = []
    for _ in range(BLOCK):
        scope = {
            "type": "http", "method": "GET", "path": "/memories/7", "raw_path": b"/memories/7", "headers": [],
            "query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80),
            "client": ("localhost", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
        }  # fmt: skip
        begin = perf_counter_ns()
        await app(scope, receive, send)
        taken.append(perf_counter_ns() - begin)
    return taken


def flask() -> Any:
    app = Flask(__name__)
    app.get("/memories/<memory_id>")(lambda memory_id: "hello")
    return app.wsgi_app


def ours_around_flask() -> Any:
    app = Flask(__name__)
    app.get("/memories/<memory_id>")(lambda memory_id: "hello")
    return WsgiMiddleware(app.wsgi_app, emitter=Emitter(tempfile.mkdtemp()))


WSGI_APPLICATIONS = {
    "bare Flask": flask,
    "spool.wsgi.AnalyticsMiddleware": ours_around_flask,
}


def wsgi_block(app: Any) -> list[int]:
    taken = []
    for _ in range(BLOCK):
        environ: dict[str, Any] = {"PATH_INFO": "/memories/7"}
        setup_testing_defaults(environ)
        begin = perf_counter_ns()
        answer = app(environ, lambda status, headers, error=None: lambda data: None)
        b"".join(answer)
        answer.close()
        taken.append(perf_counter_ns() - begin)
    return taken


def measure_wsgi(rounds: int) -> dict[str, list[float]]:
    apps = {name: make() for name, make in WSGI_APPLICATIONS.items()}
    medians: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds + 1):  # the first call warms up
        for name, app in apps.items():
            medians[name].append(statistics.median(wsgi_block(app)) / 1000)
    return {name: each[1:] for name, each in medians.items()}


async def measure(rounds: int) -> dict[str, list[float]]:
    apps: dict[str, Application] = {}
    for name, make in APPLICATIONS.items():
        try:
            apps[name] = make()
            await block(apps[name])
        except ImportError as error:
            print(f"{name} left out: {error}")
            apps.pop(name, None)
    medians: dict[str, list[float]] = {name: [] for name in apps}
    for _ in range(rounds):
        for name, app in apps.items():
            medians[name].append(statistics.median(await block(app)) / 1000)
    return medians


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=60)
    rounds = arguments.parse_args().rounds
    print(f"Python {sys.version.split()[0]}, microseconds per request")
    for medians in (asyncio.run(measure(rounds)), measure_wsgi(rounds)):
        first = next(iter(medians.values()))  # the bare one
        for name, each in medians.items():
            added = statistics.median(mine - base for mine, base in zip(each, first, strict=True))
            print(f"{name:36s} p50 {statistics.median(each):8.1f}   adds {added:8.1f}", flush=True)


if __name__ == "__main__":
    main()
