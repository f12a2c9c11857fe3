"""The tour: uses a family photo application over HTTP, kills one of its workers, and loads all events.

A response acknowledges the events that were emitted before it. Each of them must be in Postgres exactly once,
found by the request id, including those of the killed worker. There is no guarantee for events of a request
without a response, or of a background task after the response.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, LiteralString

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from loader.demo import embedded, history
from loader.errors import LoaderError
from loader.load import database, schema
from spool.segment import OPEN, SEALED

WORKERS: Final = 4
REQUESTS: Final = 2000
_AT_ONCE: Final = 32
_START_SECONDS: Final = 180.0
_CATCH_UP_SECONDS: Final = 40.0
_END_SECONDS: Final = 10.0
_LOADER: Final = (sys.executable, "-m", "loader", "run")


@dataclass(frozen=True)
class Person:
    """A user of the application."""

    role: str
    user: uuid.UUID = field(default_factory=uuid.uuid4)
    family: uuid.UUID = field(default_factory=uuid.uuid4)
    session: uuid.UUID = field(default_factory=uuid.uuid4)

    def headers(self, request_id: str) -> dict[str, str]:
        return {
            "X-User": str(self.user), "X-Family": str(self.family), "X-Session": str(self.session),
            "X-Role": self.role, "X-Request-ID": request_id,
        }  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A request, its endpoint label, and the events that are emitted before its response."""

    method: str
    path: str
    endpoint: str
    events: tuple[str, ...] = ()


_MEMORY: Final = f"/memories/{uuid.uuid4()}"
CALLS: Final = (
    Call("POST", "/login", "/login", ("user_logged_in",)),
    Call("POST", "/memories?media_count=3", "/memories"),  # its event is emitted after the response
    Call("GET", _MEMORY, "/memories/{memory_id}", ("memory_viewed",)),
    Call("POST", f"{_MEMORY}/reactions", "/memories/{memory_id}/reactions", ("reaction_created",)),
    Call("POST", f"{_MEMORY}/comments?text=lovely", "/memories/{memory_id}/comments", ("comment_created",)),
    Call("GET", "/feed?page=2", "/feed", ("feed_viewed", "feed_interaction")),
    Call("POST", "/invites", "/invites", ("invite_created", "invite_mail_queued")),
)


class Traffic:
    """Random requests of some people to the application, and its responses."""

    def __init__(self, people: Sequence[Person], calls: Sequence[Call] = CALLS) -> None:
        self.people = people
        self.asked: dict[str, Person] = {}
        """The user of each request."""
        self.answers: Counter[tuple[str, str, str]] = Counter()
        """Responses by endpoint, method and status."""
        self.acknowledged: list[tuple[str, str]] = []
        """Request id and type of each event that a response acknowledges."""
        self.unanswered = 0
        self._calls = calls

    async def run(self, address: str, requests: int) -> None:
        """Make the given number of requests, some concurrently."""
        left = iter(range(requests))
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            await asyncio.gather(*(self._work(client, left) for _ in range(_AT_ONCE)))

    async def _work(self, client: httpx.AsyncClient, left: Iterator[int]) -> None:
        for _ in left:
            call, person = random.choice(self._calls), random.choice(self.people)
            request_id = uuid.uuid4().hex
            self.asked[request_id] = person
            try:
                answer = await client.request(call.method, call.path, headers=person.headers(request_id))
            except httpx.TransportError:
                self.unanswered += 1
                continue
            self.answers[call.endpoint, call.method, str(answer.status_code)] += 1
            if answer.is_success:
                self.acknowledged += [(request_id, event) for event in call.events]


@contextlib.contextmanager
def served(spool: Path, application: str = "loader.demo.application:app") -> Iterator[str]:
    """Run an application on uvicorn with WORKERS processes; yield its address. Raises LoaderError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "uvicorn", application, "--workers", str(WORKERS), "--port", str(port),
        "--log-level", "critical",
    ]  # fmt: skip
    environment = {**os.environ, "SPOOL_DIR": str(spool)}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, env=environment, stderr=log, process_group=0) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(address):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise LoaderError(f"the application did not start: {log.read().strip()}")
                time.sleep(0.05)  # between two tries
            yield address
        finally:
            server.terminate()
            server.wait()
            _end_group(server.pid)


def _end_group(group: int) -> None:
    """Kill the workers of a server that was killed before it could stop them: they would recreate their spool."""
    deadline = time.monotonic() + _END_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)  # until they have exited


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").is_success
    except httpx.TransportError:
        return False


def run(dsn: str | None, console: Console, page: Path | None = None, *, keep: bool = False) -> bool:
    """Run the tour on `dsn`, or on a temporary server; return whether all counts add up. Raises LoaderError.

    At the end the report is written to `page`, or to a temporary file. With `keep` the server, the
    application and the loader keep running until SIGINT or SIGTERM.
    """
    with contextlib.ExitStack() as stack:
        is_given = dsn is not None
        if dsn is None:
            console.print("Starting a temporary Postgres ...")
            dsn = stack.enter_context(embedded.server())
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="analytics-spool-")))
        connection = stack.enter_context(database.connect(dsn))
        schema.apply_schema(connection)
        connection.commit()
        environment = {**os.environ, "LOADER_DSN": dsn, "SPOOL_DIR": str(spool)}
        console.print(f"Spool: {spool}. Starting an application with {WORKERS} workers, and the loader ...")
        before = _sums(connection)
        traffic = Traffic([Person(role) for role in ("parent", "child", "grandparent") * 5])
        with _loader(environment):
            with served(spool) as address:
                asyncio.run(_follow(traffic, address, spool, connection, console))
            _wait_until_loaded(spool)
        console.print("Loading the rest ...")
        drained = subprocess.run([*_LOADER, "--once"], env=environment, capture_output=True, text=True)
        console.print(f"  {drained.stdout.strip()}{drained.stderr.strip()}")
        console.print(_arrived(connection))
        holds = drained.returncode == 0 and _check(connection, traffic, before, console)
        if not is_given:  # an existing database must not get two months of invented users
            history.load(environment, console)
        console.print(f"The report, a page without scripts: {history.write(dsn, page)}")
        if keep:
            _keep(dsn, spool, environment, console)
        return holds


def _keep(dsn: str, spool: Path, environment: dict[str, str], console: Console) -> None:
    """Keep the application, the loader and the page running until a signal arrives."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with _loader(environment), served(spool) as address, history.served(dsn) as page:
        for line in (
            "", "Everything keeps running until Ctrl-C. In another terminal:",
            f"  export LOADER_DSN={shlex.quote(dsn)} SPOOL_DIR={shlex.quote(str(spool))}",
            f"  loader ask active --tz {history.ZONE}",
            f"  psql {shlex.quote(dsn)}",
            f"Application: {address}/docs", f"Page, rendered for each request: {page}",
        ):  # fmt: skip
            console.print(line, soft_wrap=True)
        ended.wait()


@contextlib.contextmanager
def _loader(environment: dict[str, str]) -> Iterator[None]:
    """Run the daemon, and stop it as systemd would."""
    # In a group of its own: Ctrl-C is handled by this process, which stops the others.
    with subprocess.Popen(
        _LOADER, env=environment, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            _, log = process.communicate()
    if process.returncode:
        raise LoaderError(f"the loader exited with {process.returncode}: {log}")


async def _follow(
    traffic: Traffic, address: str, spool: Path, connection: database.Connection, console: Console
) -> None:
    """Show the counts while the application is used; kill one of its workers after a third of the requests."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn())
    before, killed = _sums(connection)[0], False
    with Progress(*columns, console=console) as progress:
        answered = progress.add_task("responses", total=REQUESTS)
        loaded = progress.add_task("rows in Postgres", total=None)
        using = asyncio.create_task(traffic.run(address, REQUESTS))
        while not using.done():
            done = traffic.answers.total()
            if not killed and done > REQUESTS // 3 and (victim := _writer(spool)):
                os.kill(victim, signal.SIGKILL)
                killed = True
                progress.print(f"SIGKILL to worker {victim} after {done} responses.")
            progress.update(answered, completed=done)
            progress.update(loaded, completed=_sums(connection)[0] - before)
            await asyncio.sleep(0.05)  # between two looks
        await using
        progress.update(answered, completed=traffic.answers.total())


def _writer(spool: Path) -> int | None:
    """Return a process with an open segment: its pid is in the segment's name."""
    return next((int(path.stem.rsplit("-", 3)[1]) for path in spool.glob(f"*{OPEN}")), None)


def _wait_until_loaded(spool: Path) -> None:
    deadline = time.monotonic() + _CATCH_UP_SECONDS
    while any(spool.glob(f"*{SEALED}")) and time.monotonic() < deadline:
        time.sleep(0.05)  # between two looks


def _check(
    connection: database.Connection, traffic: Traffic, before: tuple[int, int], console: Console
) -> bool:
    """Whether each acknowledged event exists exactly once, the ledger adds up, and it matches the rows."""
    found = Counter[tuple[str, str]]()
    for request_id, event_type, count in connection.execute(
        "SELECT metadata->>'request_id', event_type, count(*) FROM analytics_events "
        "WHERE family_unit_id = ANY(%s) GROUP BY 1, 2",
        [[person.family for person in traffic.people]],
    ):
        found[request_id, event_type] = count
    times = Counter(found[event] for event in traffic.acknowledged)
    wrong = _number(
        connection,
        "SELECT count(*) FROM analytics_loads WHERE lines <> events + metrics + duplicates + rejected",
    )
    counted, rows = (now - then for now, then in zip(_sums(connection), before, strict=True))
    console.print(f"Responses: {traffic.answers.total()}; requests cut off by the kill: {traffic.unanswered}")
    console.print(
        f"Events acknowledged by a response: {len(traffic.acknowledged)}, in Postgres: {times[1]} once,"
    )
    console.print(f"  {times[0]} not at all, {times.total() - times[0] - times[1]} more than once")
    console.print(f"Rows in the tables: {rows}, events and metrics in the ledger: {counted}")
    console.print(f"Ledger rows whose lines are not events + metrics + duplicates + rejected: {wrong}")
    return set(times) <= {1} and counted == rows and not wrong


def _sums(connection: database.Connection) -> tuple[int, int]:
    """Return the number of rows according to the ledger, and in the tables."""
    counted = _number(connection, "SELECT coalesce(sum(events + metrics), 0) FROM analytics_loads")
    rows = "SELECT (SELECT count(*) FROM analytics_events) + (SELECT count(*) FROM analytics_metrics)"
    return counted, _number(connection, rows)


def _number(connection: database.Connection, statement: LiteralString) -> int:
    with connection.transaction():
        row = connection.execute(statement).fetchone()
    return int(row[0]) if row else 0


def _arrived(connection: database.Connection) -> Table:
    table = Table("table", "kind", "rows", title="Rows by event and metric", title_justify="left")
    for row in connection.execute(
        "SELECT 'analytics_events', event_type, count(*)::text FROM analytics_events GROUP BY 2 "
        "UNION ALL SELECT 'analytics_metrics', metric_name, count(*)::text FROM analytics_metrics GROUP BY 2 "
        "ORDER BY 1, 2"
    ):
        table.add_row(*row)
    return table
