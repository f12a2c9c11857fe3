"""The report page in a browser: it makes no requests, its figures match SQL, and it is accessible.

SCREENSHOTS=DIR keeps screenshots. axe-core is installed by npm; AXE_CORE=FILE names a copy of axe.min.js.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.see.answers.browser import PROGRAM, Page, browser
from tests.see.answers.conftest import HOSTILE, Reader, World

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
ZONE = ZoneInfo("America/New_York")
STEPS = f"feed_viewed,memory_viewed,{HOSTILE}"
LOOKS = [(width, dark) for width in (1100, 390) for dark in (False, True)]
SOME_LOOKS = [
    pytest.param(*look, marks=[] if look in ((1100, False), (390, True)) else pytest.mark.long)
    for look in LOOKS
]
MANY_ROWS = (
    "SELECT (timestamp AT TIME ZONE 'America/New_York')::date, {} FROM analytics_events "
    "WHERE timestamp >= %s AND timestamp < %s"
)


@dataclass(frozen=True)
class Made:
    """A page and its range."""

    file: Path
    since: datetime
    until: datetime

    @property
    def address(self) -> str:
        return self.file.as_uri()


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Made:
    file = tmp_path_factory.mktemp("page") / "report.html"
    until = datetime.now(UTC).replace(microsecond=0)
    arguments = ("--html", file, "--tz", ZONE.key, "--until", until.isoformat(), "--funnel", STEPS)
    Reader(world)("report", *arguments)
    first = until.astimezone(ZONE).date() - timedelta(days=28)
    return Made(file, datetime(first.year, first.month, first.day, tzinfo=ZONE), until)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("AXE_CORE"):
        return Path(given).read_text("utf-8")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: set AXE_CORE to axe.min.js")
    home = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        ["npm", "pack", "--silent", "axe-core@4"], cwd=home, capture_output=True, text=True
    )
    if packed.returncode:
        pytest.skip(f"axe-core could not be fetched: {packed.stderr.strip()[-200:]}")
    with tarfile.open(next(home.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def figures(page: Page, name: str) -> list[list[str]]:
    """Return the cells of a table of the page, row by row, headings first."""
    found = page.evaluate(
        f"[...document.querySelectorAll('[data-figures={name}] tr')].map("
        "row => [...row.cells].filter(cell => !cell.hasAttribute('aria-hidden')).map(cell => "
        "cell.textContent.trim()))"
    )
    assert isinstance(found, list)
    return found


def tiles(page: Page) -> dict[str, str]:
    found = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-tile]')].map(e => [e.dataset.tile, "
        "e.textContent]))"
    )
    assert isinstance(found, dict)
    return found


def count(text: str) -> int:
    return int(text.replace(",", ""))


def label(day: date) -> str:
    return f"{day.day} {day:%b}"


@pytest.mark.parametrize(("width", "dark"), SOME_LOOKS)
def test_the_page_makes_no_request_and_the_browser_has_nothing_to_say(
    made: Made, page: Page, width: int, dark: bool, tmp_path: Path
) -> None:
    page.open(made.address, width, dark=dark)
    assert page.requests == [made.address]
    assert page.messages == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than the screen"
    kept = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    kept.mkdir(parents=True, exist_ok=True)
    file = kept / f"report-{width}-{'dark' if dark else 'light'}.png"
    page.screenshot(file)
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(("width", "dark"), SOME_LOOKS)
def test_axe_finds_no_serious_fault(made: Made, page: Page, axe: str, width: int, dark: bool) -> None:
    page.open(made.address, width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.evaluate(axe + "; 0")
    faults = json.loads(page.evaluate("axe.run().then(found => JSON.stringify(found.violations))"))
    serious = [
        (fault["id"], [node["html"] for node in fault["nodes"]][:3])
        for fault in faults
        if fault["impact"] in ("serious", "critical", "moderate")
    ]
    assert not serious


def test_an_event_type_that_is_an_attack_is_text(made: Made, page: Page) -> None:
    page.open(made.address)
    for part in ("events", "requests", "funnel"):
        inside = (
            f"document.querySelector('[aria-labelledby={part}]').textContent.includes({json.dumps(HOSTILE)})"
        )
        assert page.evaluate(inside), part
    assert (
        page.evaluate("document.querySelectorAll('script, img, iframe, object, link, [onerror]').length") == 0
    )
    assert "<img" not in made.file.read_text("utf-8")


def test_it_has_a_policy_that_forbids_everything_but_its_style(made: Made, page: Page) -> None:
    page.open(made.address)
    policy = page.evaluate("document.querySelector('meta[http-equiv=Content-Security-Policy]').content")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "http" not in made.file.read_text("utf-8").replace("http-equiv", "").replace(
        "http://www.w3.org/", ""
    )


def test_events_by_type_are_those_in_the_table(made: Made, page: Page, world: World) -> None:
    page.open(made.address)
    headings, *rows = figures(page, "events")
    expected: dict[tuple[str, str], int] = defaultdict(int)
    shown = headings[1:-1]
    for day, kind in world.connection.execute(MANY_ROWS.format("event_type"), [made.since, made.until]):
        expected[label(day), kind if kind in shown else "(others)"] += 1
    found = {
        (row[0].removesuffix(" (in part)"), kind): count(cell)
        for row in rows
        for kind, cell in zip(headings[1:], row[1:], strict=True)
    }
    assert len(rows) == 29 and headings[-1] == "(others)"
    assert {key: value for key, value in found.items() if value} == expected
    assert count(tiles(page)["Events"]) == sum(expected.values())


def test_active_users_are_those_of_a_brute_force_count(made: Made, page: Page, world: World) -> None:
    page.open(made.address)
    seen: dict[date, set[object]] = defaultdict(set)
    before = made.since - timedelta(days=28)
    for day, user in world.connection.execute(MANY_ROWS.format("user_id"), [before, made.until]):
        seen[day].add(user)
    first = made.since.astimezone(ZONE).date()
    _, *rows = figures(page, "active")
    for number, row in enumerate(rows):
        day = first + timedelta(days=number)
        expected = [
            len(set().union(*(seen[day - timedelta(days=back)] for back in range(length))))
            for length in (1, 7, 28)
        ]
        assert [count(cell) for cell in row[1:4]] == expected, day
    last_whole = next(row for row in reversed(rows) if "in part" not in row[0])
    assert tiles(page)["Active users, 28 days"] == last_whole[3]


def test_requests_are_those_of_the_counters_and_timers(made: Made, page: Page, world: World) -> None:
    page.open(made.address)
    statement = (
        "SELECT labels->>'method' || ' ' || (labels->>'endpoint'), "
        "sum(value) FILTER (WHERE metric_name = 'api_request_count')::bigint, "
        "coalesce(sum(value) FILTER (WHERE metric_name = 'api_request_count' AND labels->>'status' >= "
        "'500'), 0)::bigint, "
        "percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY value) "
        "FILTER (WHERE metric_name = 'api_request_duration_ms') FROM analytics_metrics "
        "WHERE metric_name LIKE 'api_request%%' AND timestamp >= %s AND timestamp < %s GROUP BY 1"
    )
    values = [made.until - timedelta(days=1), made.until]
    expected = {row[0]: row[1:] for row in world.connection.execute(statement.encode(), values)}
    _, *rows = figures(page, "requests")
    assert {row[0] for row in rows} == set(expected)
    for name, requests, failed, *times in rows:
        number, errors, percentiles = expected[name]
        assert count(requests) == number
        assert float(failed.strip("%<>")) == pytest.approx(100 * errors / number, abs=0.011)
        for shown, exact in zip(times, percentiles, strict=True):
            within = 0.01 * float(exact) + 0.51  # the rollup's 1 %, and a rounded millisecond
            assert float(shown.replace(",", "")) == pytest.approx(float(exact), abs=within)
    assert count(tiles(page)["Requests, 24 hours"]) == sum(number for number, *_ in expected.values())


def test_lifecycle_retention_and_funnel_are_those_of_the_functions(
    made: Made, page: Page, world: World
) -> None:
    page.open(made.address)
    monday = made.until.astimezone(ZONE).date()
    monday -= timedelta(days=monday.weekday())

    def since(weeks: int) -> datetime:
        first = monday - timedelta(weeks=weeks - 1)
        return datetime(first.year, first.month, first.day, tzinfo=ZONE)

    def rows(statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return world.connection.execute(statement.encode(), values).fetchall()

    lifecycle = (
        "SELECT starts, new, retained, resurrected, dormant "
        "FROM analytics_lifecycle(%s, %s, 'week', %s) ORDER BY 1"
    )
    expected = [[label(row[0]), *row[1:]] for row in rows(lifecycle, since(12), made.until, ZONE.key)]
    _, *found = figures(page, "lifecycle")
    shown = [[row[0].removesuffix(" (in part)"), *map(count, row[1:])] for row in found]
    assert shown == expected[-len(shown) :] and not any(
        value for row in expected[: -len(shown)] for value in row[1:]
    )

    grid: dict[str, list[int]] = defaultdict(list)
    retention = (
        "SELECT cohort, round(100 * rate) "
        "FROM analytics_retention(%s, %s, 'week', %s, 8) ORDER BY cohort, period"
    )
    for cohort, rate in rows(retention, since(9), made.until, ZONE.key):
        grid[label(cohort)].append(int(rate))
    _, *found = figures(page, "retention")
    for row in found:
        cells = [int(cell.strip("%<>")) for cell in row[2:] if cell]
        assert all(abs(a - b) <= 1 for a, b in zip(cells, grid[row[0]], strict=True)), row

    reached = page.evaluate(
        "[...document.querySelectorAll('[data-figures=funnel] .reached')].map(e => e.textContent)"
    )
    funnel = "SELECT reached FROM analytics_funnel(%s, %s, %s, '1 day') ORDER BY step"
    expected_reached = [row[0] for row in rows(funnel, STEPS.split(","), made.since, made.until)]
    assert [count(text.removesuffix(" users")) for text in reached] == expected_reached


def test_the_pipeline_is_that_of_the_ledger(made: Made, page: Page, world: World) -> None:
    page.open(made.address)
    entries = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-figures=pipeline] div')].map(each => "
        "[each.querySelector('dt').firstChild.nextSibling.textContent, each.querySelector('dd "
        "b').textContent]))"
    )
    ledger = "SELECT sum({}) FROM analytics_loads"
    assert count(entries["Lines loaded"]) == world.number(ledger.format("lines"))
    assert count(entries["Duplicates"]) == world.number(ledger.format("duplicates"))
    assert count(entries["Rejected"]) == world.number(ledger.format("rejected")) == 1
    assert count(entries["Dropped by emitters"]) == 2
    assert count(entries["Missing segments"]) == world.number(
        "SELECT count(*) FROM analytics_missing_segments"
    )
    assert entries["Lag"].endswith(" s") and tiles(page)["Lines not loaded"] == "3"
