"""Renders answers as text tables with bars and sparklines, for terminals of 80 columns or more."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loader.errors import one_line
from loader.see import figures
from loader.see.questions import Answer
from loader.see.report import Report

UNFINISHED: Final = "*"
"""Marks a bucket that is only partly inside the range: one that has not ended, or a cut-off first one."""
_BAR: Final = 18
_SPARK: Final = 36


def trend(answer: Answer) -> Table:
    """Render a row per event type: total, share, and trend over the buckets."""
    buckets = sorted({row[0] for row in answer.rows})
    found: dict[str, dict[Any, int]] = defaultdict(dict)
    for starts, kind, events, _ in answer.rows:
        found[kind][starts] = events
    totals = {kind: sum(each.values()) for kind, each in found.items()}
    table = _table("event", ">events", ">share", "course", title=_title(answer))
    for kind in sorted(totals, key=lambda kind: (-totals[kind], kind)):
        course = [found[kind].get(each, 0) for each in buckets]
        part = totals[kind] / sum(totals.values()) if totals[kind] else None
        _row(table, kind, figures.count(totals[kind]), figures.share(part), figures.spark(course, _SPARK))
    return table


def active(answer: Answer) -> Table:
    """Render a row per day."""
    table = _table("day", ">1 day", ">7 days", ">28 days", ">1/28", "", title=_title(answer))
    peak = max((dau for _, dau, *_ in answer.rows), default=0)
    for day, dau, wau, mau, stickiness, complete in answer.rows:
        _row(
            table, _mark(day, complete=complete), figures.count(dau), figures.count(wau), figures.count(mau),
            figures.share(stickiness), figures.bar(dau, peak, _BAR),
        )  # fmt: skip
    return table


def lifecycle(answer: Answer) -> Table:
    """Render a row per bucket; the bar shows active users."""
    table = _table("from", ">new", ">retained", ">resurrected", ">dormant", "active", title=_title(answer))
    peak = max((sum(row[1:4]) for row in answer.rows), default=0)
    for starts, new, retained, resurrected, dormant, complete in answer.rows:
        _row(
            table, _mark(starts, complete=complete),
            *(figures.count(value) for value in (new, retained, resurrected, dormant)),
            figures.bar(new + retained + resurrected, peak, _BAR),
        )  # fmt: skip
    return table


def retention(answer: Answer, width: int) -> Table:
    """Render a row per cohort, with a column for each period that fits."""
    cohorts: dict[Any, dict[int, tuple[Any, bool]]] = defaultdict(dict)
    sizes = {}
    for cohort, size, period, _, rate, complete in answer.rows:
        sizes[cohort] = size
        cohorts[cohort][period] = rate, complete
    periods = max((period for each in cohorts.values() for period in each), default=0)
    fits = min(periods, (width - 22) // 7)
    headings = [f">{number}" for number in range(fits + 1)]
    table = _table("from", ">users", *headings, title=_title(answer))
    for cohort, cells in cohorts.items():
        shown = [
            _cell(cells[number][0], complete=cells[number][1]) if number in cells else Text()
            for number in range(fits + 1)
        ]
        _row(table, figures.bucket(cohort, answer.period.zone), figures.count(sizes[cohort]), *shown)
    if fits < periods:
        table.caption = f"periods {fits + 1} to {periods} do not fit: widen the terminal, or use --json"
    return table


def _cell(rate: Any, *, complete: bool) -> Text:
    """Render a share with a background of matching intensity."""
    text = figures.share(rate) + ("" if complete else UNFINISHED)
    level = round(float(rate or 0) * 4)
    return Text(text, style="" if not complete else f"on grey{(0, 19, 27, 35, 42)[level]}" if level else "")


def funnel(answer: Answer, *, broken_down: bool) -> Table:
    """Render a row per step."""
    keys = ("by",) if broken_down else ()
    table = _table(
        *keys, "step", ">reached", ">of first", ">of last", ">half in", ">90% in", "", title=_title(answer)
    )
    width = 8 if broken_down else 12
    for value, step, kind, reached, of_first, of_previous, p50, p90 in answer.rows:
        times = (figures.NONE,) * 2 if step == 1 else (figures.duration(p50), figures.duration(p90))
        _row(
            table, *((figures.NONE if value is None else value,) if broken_down else ()), kind,
            figures.count(reached), figures.share(of_first), figures.share(of_previous), *times,
            figures.bar(of_first or 0, 1, width),
        )  # fmt: skip
    return table


def sessions(answer: Answer) -> Table:
    """Render a row per bucket of session starts."""
    table = _table("from", ">sessions", ">users", ">events", ">half", ">90%", "", title=_title(answer))
    peak = max((row[1] for row in answer.rows), default=0)
    for starts, number, users, events, half, most, complete in answer.rows:
        _row(
            table, _mark(starts, complete=complete), figures.count(number), figures.count(users),
            figures.NONE if events is None else f"{events:.1f}", figures.duration(half),
            figures.duration(most), figures.bar(number, peak, _BAR),
        )  # fmt: skip
    return table


def requests(answer: Answer, course: Answer) -> Table:
    """Render a row per endpoint, with the trend of its requests."""
    buckets = sorted({row[0] for row in course.rows})
    found: dict[tuple[str, str], dict[Any, int]] = defaultdict(dict)
    for starts, endpoint, method, number, *_ in course.rows:
        found[endpoint, method][starts] = number
    table = _table("endpoint", ">requests", ">failed", ">p50", ">p95", ">p99", "", title=_title(answer))
    for endpoint, method, number, _, failed, *times in answer.rows:
        line = [found[endpoint, method].get(each, 0) for each in buckets]
        _row(
            table, f"{method or ''} {endpoint or figures.NONE}".strip(), figures.count(number),
            figures.share(failed, 1), *map(figures.milliseconds, times), figures.spark(line, 10),
        )  # fmt: skip
    return table


def anomalies(answer: Answer) -> Table:
    """Render a row per episode, the latest first."""
    table = _table("from", ">hours", "event", ">events", ">expected", ">z", title=_title(answer))
    for starts, ends, kind, events, expected, z in answer.rows:
        _row(
            table, figures.bucket(starts, answer.period.zone),
            f"{(ends - starts) / timedelta(hours=1):.0f}", kind,
            figures.count(events), figures.count(expected), f"{z:+.1f}",
        )  # fmt: skip
    return table


def interactions(answer: Answer) -> Table:
    """Render a row per user and memory."""
    table = _table("user", "memory", ">views", ">reac.", ">com.", ">weight", title=_title(answer))
    for user, memory, views, reactions, comments, _, weight, _ in answer.rows:
        _row(table, user, memory, *map(figures.count, (views, reactions, comments)), f"{weight:.1f}")
    return table


def timeline(answer: Answer) -> Table:
    """Render a row per event of one user, with a blank line between sessions."""
    table = _table("time", "event", "metadata", title=_title(answer))
    last = None
    for moment, kind, session, _, metadata in answer.rows:
        if last not in (None, session):
            table.add_section()
        last = session
        shown = f"{moment.astimezone(answer.period.zone):%Y-%m-%d %H:%M:%S}"
        _row(table, shown, kind, " ".join(f"{name}={_brief(value)}" for name, value in metadata.items()))
    return table


def _brief(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _title(answer: Answer) -> str:
    return str(answer.period)


def _mark(starts: Any, *, complete: bool) -> str:
    return f"{starts:%a %Y-%m-%d}{'' if complete else UNFINISHED}"


def _table(*headings: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        number = heading.startswith(">")
        # Numbers are never truncated, because a truncated number is wrong.
        table.add_column(
            heading.removeprefix(">"), justify="right" if number else "left", no_wrap=number or not heading,
            overflow="fold",
        )  # fmt: skip
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(cell if isinstance(cell, Text) else Text(one_line(str(cell))) for cell in cells))


def notes(answer: Answer) -> Iterable[str]:
    """Return notes on the limitations of an answer."""
    if "complete" in answer.columns and not all(row[-1] for row in answer.rows):
        if answer.question != "trend":
            yield f"{UNFINISHED} only partly inside the range"
        else:
            yield "the first or last bucket is only partly inside the range"
    if not answer.rows:
        yield "no data in this range"


def rows(answer: Answer) -> Sequence[dict[str, Any]]:
    """Return the rows as objects with column names, for JSON."""
    where = answer.period.zone
    return [
        {name: figures.plain(value, where) for name, value in zip(answer.columns, row, strict=True)}
        for row in answer.rows
    ]


def summary(report: Report, width: int) -> Iterator[tuple[str, Table]]:
    """Return the parts of the report with their titles."""
    yield "Events by type", trend(report.trend)
    yield "Active users", active(_tail(report.active, 7))
    yield "Lifecycle by week", lifecycle(_tail(report.lifecycle, 6))
    yield "Requests", _endpoints(report.requests)
    yield "Retention by week", retention(report.retention, width)
    yield "Funnel within a day", funnel(report.funnel, broken_down=False)
    yield "Unusual hours", anomalies(report.anomalies)
    yield "Pipeline", _pipeline(report)


def _tail(answer: Answer, rows: int) -> Answer:
    return replace(answer, rows=answer.rows[-rows:])


def _endpoints(answer: Answer) -> Table:
    return requests(answer, replace(answer, rows=()))


def _pipeline(report: Report) -> Table:
    facts = report.pipeline
    causes = ", ".join(f"{cause} {figures.count(number)}" for cause, number in facts.drops)
    lag = f"half {figures.duration(facts.lag_half)}, 99% {figures.duration(facts.lag_most)}"
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("events", f"{figures.count(report.events)}, {figures.change(report.events, report.events_before)}"),
        ("lag, last 24 hours", figures.NONE if facts.lag_half is None else lag),
        ("lines loaded", figures.count(facts.lines)),
        ("duplicates", figures.count(facts.duplicates)),
        ("rejected", figures.count(facts.rejected)),
        ("dropped by emitters", causes or "0"),
        ("missing segments", figures.count(facts.missing_segments)),
        ("hours to roll up", figures.count(facts.touched_hours)),
    ):
        _row(table, name, value)
    return table


def report_facts(report: Report) -> dict[str, Any]:
    """Return the whole report for JSON."""
    where = report.period.zone
    parts = ("trend", "active", "lifecycle", "requests", "retention", "funnel", "anomalies")
    facts = {name: figures.plain(value, where) for name, value in vars(report.pipeline).items()}
    return {
        "since": figures.plain(report.period.since, where),
        "until": figures.plain(report.period.until, where),
        "tz": report.period.tz, "events": report.events, "events_before": report.events_before,
        **{part: rows(getattr(report, part)) for part in parts},
        "pipeline": facts | {"drops": dict(report.pipeline.drops)},
    }  # fmt: skip
