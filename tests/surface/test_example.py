"""The example application under uvicorn with four workers: Postgres has the events of its clients."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from loader.demo.tour import CALLS, Call, Person, Traffic, served
from loader.load.database import Connection
from tests.load.lines import rows
from tests.processes import Cli

WRONG_CALLS = (
    Call("GET", "/broken", "/broken"),
    Call("GET", "/missing", "/missing"),
    Call("GET", "/nowhere/at/all", "unmatched"),
    Call("GET", "/memories/no-uuid", "/memories/{memory_id}"),
)


def check(cli: Cli, connection: Connection, requests: int) -> None:
    traffic = Traffic([Person("parent"), Person("child")], (*CALLS, *WRONG_CALLS))
    with served(cli.spool, "loader.demo.application:app") as address:
        asyncio.run(traffic.run(address, requests))
    counts = traffic.answers
    assert counts.total() == requests
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
        person = traffic.asked[request_id]
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
