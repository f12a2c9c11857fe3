"""The example application under uvicorn with four workers: what its clients did is what Postgres has."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from loader.database import Connection
from tests.load.lines import rows
from tests.processes import Cli, eventually

ROOT = Path(__file__).parents[2]
MEMORY = uuid.uuid4()
CALLS = (
    ("POST", "/login", "/login"),
    ("POST", "/memories?media_count=3", "/memories"),
    ("GET", f"/memories/{MEMORY}", "/memories/{memory_id}"),
    ("POST", f"/memories/{MEMORY}/reactions", "/memories/{memory_id}/reactions"),
    ("POST", f"/memories/{MEMORY}/comments?text=lovely", "/memories/{memory_id}/comments"),
    ("GET", "/feed?page=2", "/feed"),
    ("POST", "/invites", "/invites"),
    ("GET", "/broken", "/broken"),
    ("GET", "/missing", "/missing"),
    ("GET", "/nowhere/at/all", "unmatched"),
    ("GET", "/memories/no-uuid", "/memories/{memory_id}"),
)
"""Method, what is asked for, and the endpoint it counts for."""


@dataclass(frozen=True)
class Person:
    role: str
    user: uuid.UUID = field(default_factory=uuid.uuid4)
    family: uuid.UUID = field(default_factory=uuid.uuid4)
    session: uuid.UUID = field(default_factory=uuid.uuid4)

    def headers(self, request_id: str) -> dict[str, str]:
        return {
            "X-User": str(self.user), "X-Family": str(self.family), "X-Session": str(self.session),
            "X-Role": self.role, "X-Request-ID": request_id,
        }  # fmt: skip


@contextmanager
def served(spool: Path, workers: int) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "uvicorn", "tests.example.application:app", "--workers", str(workers),
        "--port", str(port), "--log-level", "critical",
    ]  # fmt: skip
    environment = Cli(spool, "").environment
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        eventually(lambda: answers(address))
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False


async def use(address: str, requests: int) -> tuple[Counter[tuple[str, str, str]], dict[str, Person]]:
    """Call at random, 32 at a time; return what was answered, by endpoint, and whose each request was."""
    counts: Counter[tuple[str, str, str]] = Counter()
    people = [Person("parent"), Person("child")]
    asked: dict[str, Person] = {}
    left = iter(range(requests))

    async def work(client: httpx.AsyncClient) -> None:
        for _ in left:
            method, path, endpoint = random.choice(CALLS)
            person, request_id = random.choice(people), uuid.uuid4().hex
            asked[request_id] = person
            answer = await client.request(method, path, headers=person.headers(request_id))
            assert answer.headers.get("X-Request-ID", request_id) == request_id
            counts[endpoint, method, str(answer.status_code)] += 1

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        await asyncio.gather(*(work(client) for _ in range(32)))
    return counts, asked


def check(cli: Cli, connection: Connection, requests: int) -> None:
    with served(cli.spool, workers=4) as address:
        counts, asked = asyncio.run(use(address, requests))
    assert sum(counts.values()) == requests
    assert "rejected 0" in cli("run", "--once")

    def counted(metric: str) -> Counter[tuple[str, str, str]]:
        found = rows(
            connection,
            "SELECT labels->>'endpoint', labels->>'method', labels->>'status', count(*), sum(value) "
            f"FROM analytics_metrics WHERE metric_name = '{metric}' GROUP BY 1, 2, 3",
        )
        return Counter({(endpoint, method, status): n for endpoint, method, status, n, _ in found})

    assert counted("api_request_count") == counts == counted("api_request_duration_ms")
    errors = {each: n for each, n in counts.items() if each[2] >= "500"}
    assert counted("api_request_error_count") == errors
    events = rows(
        connection,
        "SELECT user_id, family_unit_id, session_id, metadata->>'role', metadata->>'request_id', "
        "event_type, metadata::text FROM analytics_events",
    )
    for user, family, session, role, request_id, _, text in events:
        person = asked[request_id]
        assert (user, family, session, role) == (person.user, person.family, person.session, person.role)
        assert "not for the spool" not in text
    kinds = Counter(event[5] for event in events)
    for kind, endpoint, method, status in (
        ("memory_posted", "/memories", "POST", "201"),
        ("memory_viewed", "/memories/{memory_id}", "GET", "200"),
        ("reaction_created", "/memories/{memory_id}/reactions", "POST", "201"),
        ("comment_created", "/memories/{memory_id}/comments", "POST", "201"),
        ("feed_viewed", "/feed", "GET", "200"),
        ("feed_interaction", "/feed", "GET", "200"),
        ("invite_created", "/invites", "POST", "201"),
        ("invite_mail_queued", "/invites", "POST", "201"),
        ("user_logged_in", "/login", "POST", "200"),
    ):
        assert kinds[kind] == counts[endpoint, method, status], kind


def test_what_clients_did_is_what_postgres_has(cli: Cli, one_connection: Connection) -> None:
    check(cli, one_connection, 1000)


@pytest.mark.long
def test_what_clients_did_in_twenty_thousand_requests_is_what_postgres_has(
    cli: Cli, one_connection: Connection
) -> None:
    check(cli, one_connection, 20_000)
