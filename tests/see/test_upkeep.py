"""`loader prune`, `rollup` and `status` keep the rollups right and report their state."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from loader.load.database import Connection
from tests.load.lines import event, metric, number, rows, segment
from tests.processes import Cli

TREND = "SELECT sum(events) FROM analytics_trend('2019-12-31', '2020-01-03')"
REQUESTS = "SELECT sum(requests) FROM analytics_requests('2019-12-31', '2020-01-03', 'day')"
SEEN = "SELECT sum(dau) FROM analytics_active('2019-12-31', '2020-01-03')"


@pytest.fixture
def loaded(cli: Cli, one_connection: Connection) -> Connection:
    """Return the command line after loading two days of 2020 and the current hour."""
    old = [event(n, timestamp=f"2020-01-0{1 + n % 2}T0{n % 5}:30:00Z") for n in range(30)]
    counted = [
        metric(n, timestamp="2020-01-01T07:30:00Z", metric_name="api_request_count", value=2)
        for n in range(9)
    ]
    segment(cli.spool, 1, *old, *counted, event(99, timestamp=datetime.now(UTC).isoformat()))
    cli("run", "--once")
    return one_connection


def answers(connection: Connection) -> object:
    found = [rows(connection, statement) for statement in (TREND, REQUESTS, SEEN)]
    connection.commit()
    return found


@pytest.mark.parametrize("refreshed", [pytest.param(False, marks=pytest.mark.long), True])
def test_prune_keeps_every_answer(cli: Cli, loaded: Connection, *, refreshed: bool) -> None:
    if refreshed:
        cli("rollup")
    before = answers(loaded)
    printed = json.loads(cli.owner()("prune", "--older-than", "90d", "--json"))
    assert (printed["events"], printed["metrics"]) == (30, 9)
    assert number(loaded, "SELECT count(*) FROM analytics_events") == 1
    assert answers(loaded) == before
    cli("rollup")
    assert answers(loaded) == before


def test_rows_that_come_late_into_a_pruned_hour_are_added_by_the_next_prune(
    cli: Cli, loaded: Connection
) -> None:
    cli.owner()("prune", "--older-than", "90d")
    late = segment(cli.spool, 2, event(500, timestamp="2020-01-01T00:45:00Z"))
    cli("backfill", "--keep-expired", late)
    for _ in range(2):
        assert number(loaded, TREND) == 31
        loaded.commit()
        cli.owner()("prune", "--older-than", "90d")
    assert number(loaded, "SELECT count(*) FROM analytics_events") == 1


def test_rows_that_others_inserted_without_a_mark_are_pruned_and_counted(
    cli: Cli, loaded: Connection
) -> None:
    loaded.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) SELECT "
        "gen_random_uuid(), 'unmarked', '2020-01-02 12:00+00', gen_random_uuid(), gen_random_uuid() "
        "FROM generate_series(1, 12000)"
    )
    loaded.commit()
    assert json.loads(cli.owner()("prune", "--older-than", "90d", "--json"))["events"] == 12_030
    assert number(loaded, TREND) == 12_030


def test_the_hour_in_which_the_age_lies_stays(cli: Cli, one_connection: Connection) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=24)
    made = [event(1, timestamp=hour.isoformat()), event(2, timestamp=(hour - timedelta(hours=2)).isoformat())]
    segment(cli.spool, 1, *made)
    cli("run", "--once")
    for options in (["--dry-run"], []):
        printed = json.loads(cli.owner()("prune", "--older-than", "1d", "--json", *options))
        assert printed["events"] == 1
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 1


def test_a_role_that_may_delete_may_prune(cli: Cli, loaded: Connection) -> None:
    name = f"pruner_{loaded.info.backend_pid}"
    role = sql.Identifier(name)
    loaded.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    grant = sql.SQL(
        "GRANT SELECT, DELETE ON analytics_events, analytics_metrics, analytics_loads, analytics_writers TO {}"
    )
    loaded.execute(grant.format(role))
    loaded.commit()
    try:
        cli.owner()("init")
        dsn = make_conninfo(cli.owner().dsn, user=name)
        assert json.loads(cli("prune", "--older-than", "90d", "--json", "--dsn", dsn))["events"] == 30
    finally:
        loaded.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
        loaded.commit()


def test_status_shows_touched_hours_and_their_age(cli: Cli, loaded: Connection) -> None:
    found = json.loads(cli("status", "--json"))["rollups"]
    assert found["touched_hours"] == 11 + 1 and found["built"] is True
    assert found["touched_seconds"] > 5 * 365 * 86400
    assert "touched hours" in cli("status")
    assert json.loads(cli("rollup", "--json"))["touched_hours"] == 1  # has not ended
    assert json.loads(cli("status", "--json"))["rollups"]["touched_hours"] == 1
    loaded.execute("DROP TABLE analytics_touched CASCADE")
    loaded.commit()
    assert json.loads(cli("status", "--json"))["rollups"] is None


def test_verify_finds_what_others_changed_and_rebuild_counts_it(cli: Cli, loaded: Connection) -> None:
    cli("rollup")
    assert "match" in cli("rollup", "--verify")
    loaded.execute("DELETE FROM analytics_events WHERE timestamp = '2020-01-01 00:30+00'")
    loaded.commit()
    assert "1 hours of the rollups do not match" in cli("rollup", "--verify", code=1)
    assert number(loaded, TREND) == 30
    loaded.commit()
    cli("rollup", "--rebuild")
    assert "match" in cli("rollup", "--verify")
    assert number(loaded, TREND) == 27


def test_rebuild_and_verify_exclude_each_other(cli: Cli) -> None:
    assert "are mutually exclusive" in cli("rollup", "--rebuild", "--verify", code=2)


def test_tables_without_rollups_are_not_pruned_by_halves(cli: Cli, loaded: Connection) -> None:
    loaded.execute("DROP FUNCTION analytics_refresh")
    loaded.commit()
    assert "run `loader init`" in cli.owner()("prune", "--older-than", "90d", code=1)
    with psycopg.connect(loaded.info.dsn) as other:
        assert number(other, "SELECT count(*) FROM analytics_events") == 31
