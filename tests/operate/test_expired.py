"""Lines older than the pruned data are not loaded again and are counted; each table has its own age."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import lowwater, schema
from loader.load.database import Connection
from tests.load.lines import event, metric, number, rejected, rows, segment
from tests.operate.test_metrics import scrape
from tests.processes import HANGS_AFTER, LOADER, Cli, eventually, free_port
from tests.servers import ROLE, database

NOW = datetime.now(UTC)
EVENTS = "SELECT count(*) FROM analytics_events"
METRICS = "SELECT count(*) FROM analytics_metrics"
SETTINGS = "SELECT name, value FROM analytics_settings WHERE name LIKE '%kept_since' ORDER BY 1"
WAITS = (
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


def id_at(moment: datetime, number: int) -> str:
    """Return a UUIDv7 of a time."""
    digits = f"{int(moment.timestamp() * 1000):012x}7000a{number:015x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def event_of(days: float, number: int) -> bytes:
    """An event of some days ago, with the id of that time."""
    moment = NOW - timedelta(days=days)
    return event(number, event_id=id_at(moment, number), timestamp=moment.isoformat())


def metric_of(days: float, number: int) -> bytes:
    moment = NOW - timedelta(days=days)
    return metric(number, event_id=id_at(moment, number), timestamp=moment.isoformat())


@pytest.fixture(params=[pytest.param("plain", marks=pytest.mark.long), "partitioned"])
def layout(request: pytest.FixtureRequest) -> schema.Layout:
    found: schema.Layout = request.param
    return found


@pytest.fixture
def owner(one_server: str, layout: schema.Layout) -> Iterator[Connection]:
    with database(one_server, template=layout) as dsn, psycopg.connect(dsn) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def loader(owner: Connection, spool: Path) -> Cli:
    return Cli(spool, make_conninfo(owner.info.dsn, user=ROLE))


def replayed(loader: Cli, owner: Connection) -> Path:
    """Load five events and three metrics of 40 and 10 days ago, prune rows older than 30 days, and remove the files."""
    lines = [*(event_of(40, n) for n in range(5)), *(metric_of(40, 100 + n) for n in range(3))]
    path = segment(loader.spool, 1, *lines, event_of(10, 50), metric_of(10, 150))
    archived = Path(shutil.copy(path, loader.spool.parent / path.name))
    loader("run", "--once")
    printed = json.loads(loader.owner()("prune", "--older-than", "30d", "--json"))
    assert (printed["events"], printed["metrics"]) == (5, 3)
    owner.execute("TRUNCATE analytics_loads")
    owner.commit()
    return archived


def test_a_replay_below_the_mark_is_expired(loader: Cli, owner: Connection) -> None:
    archived = replayed(loader, owner)
    printed = json.loads(loader("backfill", archived, "--json"))
    counts = {"events": 0, "metrics": 0, "duplicates": 2, "rejected": 0, "expired": 8, "known": 0}
    assert {name: printed[name] for name in counts} == counts
    assert (number(owner, EVENTS), number(owner, METRICS)) == (1, 1)
    assert not rejected(loader.spool)
    assert rows(owner, "SELECT lines, duplicates, expired FROM analytics_loads") == [(10, 2, 8)]
    assert rows(owner, "SELECT emitted, duplicates, expired, missing FROM analytics_conservation") == [
        (10, 2, 8, 0)
    ]
    assert json.loads(loader("status", "--json"))["database"]["expired"] == 8
    assert re.search(r"expired +8\b", loader("status"))
    assert "known 10" in loader("backfill", archived)


def test_keep_expired_loads_it(loader: Cli, owner: Connection) -> None:
    archived = replayed(loader, owner)
    assert "`loader backfill --keep-expired` loads them" in loader("backfill", archived)
    assert "events 5, metrics 3, duplicates 2" in loader("backfill", "--keep-expired", archived)
    assert "events 0, metrics 0, duplicates 10" in loader("backfill", "--keep-expired", archived)
    assert (number(owner, EVENTS), number(owner, METRICS)) == (6, 4)


def test_the_daemon_counts_what_is_expired(loader: Cli, owner: Connection) -> None:
    archived = replayed(loader, owner)
    port = free_port()
    with loader.daemon("--metrics-port", str(port)):
        shutil.copy(archived, loader.spool / "copying")
        (loader.spool / "copying").rename(loader.spool / archived.name)
        eventually(lambda: number(owner, "SELECT sum(expired) FROM analytics_loads") == 8)
        eventually(lambda: scrape(port).get("analytics_loader_expired_total") == 8)


def test_each_table_has_its_own_age_and_mark(loader: Cli, owner: Connection) -> None:
    segment(loader.spool, 1, event_of(40, 1), metric_of(40, 2), event_of(800, 3), metric_of(10, 4))
    loader("run", "--once")
    assert rows(owner, SETTINGS) == []
    printed = json.loads(
        loader.owner()("prune", "--events", "2y", "--metrics", "30d", "--ledger", "90d", "--json")
    )
    assert (printed["events"], printed["metrics"], printed["loads"]) == (1, 1, 0)
    assert (number(owner, EVENTS), number(owner, METRICS)) == (1, 1)
    marks = {name: datetime.fromisoformat(value) for name, value in rows(owner, SETTINGS)}
    assert NOW - timedelta(days=801) < marks["events_kept_since"] <= NOW - timedelta(days=730)
    assert NOW - timedelta(days=41) < marks["metrics_kept_since"] <= NOW - timedelta(days=30)
    segment(loader.spool, 2, event_of(45, 5), metric_of(45, 6))
    assert "events 1, metrics 0, duplicates 0, rejected 0, erased 0, expired 1" in loader("run", "--once")


def test_what_has_no_age_is_kept(loader: Cli, owner: Connection) -> None:
    segment(loader.spool, 1, event_of(40, 1), metric_of(40, 2))
    loader("run", "--once")
    owner.execute("UPDATE analytics_loads SET loaded_at = now() - interval '40 days'")
    owner.commit()
    printed = json.loads(loader.owner()("prune", "--metrics", "30d", "--json"))
    assert (printed["events"], printed["metrics"], printed["loads"]) == (0, 1, 0)
    assert json.loads(loader.owner()("prune", "--ledger", "30d", "--json"))["loads"] == 1
    assert number(owner, EVENTS) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no age is given: use --older-than AGE"),
        (["--events", "0d"], "an age of 0 would remove all events"),
        (["--ledger", "0d"], "an age of 0 would remove all ledger"),
        (["--events", "2 years"], "is not an age: write a number and y, w, d, h or m"),
        (["--metrics", "9999y"], "is before the year 1"),
        (["--dry-run"], "no age is given"),
    ],
)
def test_ages_that_cannot_be_meant_are_refused(cli: Cli, arguments: list[str], words: str) -> None:
    assert words in cli.owner()("prune", *arguments, code=2)


def test_ids_without_a_time_go_by_their_timestamp(loader: Cli, owner: Connection) -> None:
    old, new = ((NOW - timedelta(days=days)).isoformat() for days in (40, 10))
    lines = [
        event(n, event_id=f"deadbeef-1234-4234-8234-{n:012x}", timestamp=old if n < 3 else new)
        for n in range(5)
    ]
    path = segment(loader.spool, 1, *lines)
    archived = Path(shutil.copy(path, loader.spool.parent / "again.ndjson"))
    loader("run", "--once")
    assert json.loads(loader.owner()("prune", "--older-than", "30d", "--json"))["events"] == 3
    owner.execute("TRUNCATE analytics_loads")
    owner.commit()
    assert "duplicates 2, rejected 0, erased 0, expired 3" in loader("backfill", archived)


def test_a_load_that_prune_overtakes_is_repeated(loader: Cli, owner: Connection) -> None:
    """It read the marks before the rows were deleted, and its rows wait for the deletion."""
    path = segment(
        loader.spool, 1, *(event(n, event_id=f"deadbeef-1234-4234-8234-{n:012x}") for n in range(5))
    )
    archived = Path(shutil.copy(path, loader.spool.parent / "again.ndjson"))
    loader("run", "--once")
    loader("rollup")
    hour = "2026-01-20T12:00:00Z"
    owner.execute("TRUNCATE analytics_loads")
    owner.commit()
    with psycopg.connect(owner.info.dsn) as pruner:
        assert pruner.execute(f"SELECT analytics_prune_hour('events', '{hour}')".encode()).fetchone() == (5,)
        loading = subprocess.Popen(
            [*LOADER, "backfill", str(archived), "--json"], env=loader.environment, stdout=subprocess.PIPE
        )
        eventually(lambda: number(owner, WAITS))
    printed = json.loads(loading.communicate(timeout=HANGS_AFTER)[0])
    assert (printed["events"], printed["duplicates"], printed["expired"]) == (0, 0, 5)
    assert number(owner, EVENTS) == 0


def test_a_mark_is_never_lowered(owner: Connection) -> None:
    for moment in ("2026-01-02 03:00+00", "2025-01-01 00:00+00"):
        owner.execute(f"SELECT analytics_raise_mark('events', '{moment}')".encode())
        owner.commit()
    assert rows(owner, SETTINGS) == [("events_kept_since", "2026-01-02T03:00:00Z")]
    with owner.transaction():
        (mark,) = lowwater.read(owner).values()
    assert mark.hour == "2026-01-02T03" and mark.moment == datetime(2026, 1, 2, 3, tzinfo=UTC)
