"""Renders the report as one self-contained page without scripts or requests; its policy forbids both.

Names of events and endpoints are untrusted. The template escapes every value; charts never contain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from importlib.resources import files
from itertools import dropwhile
from shlex import quote
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from loader.see import charts, figures
from loader.see.questions import WHAT_ANOMALIES_MISS
from loader.see.report import FUNNEL_WITHIN, OTHERS, RETENTION_WEEKS, Report

_ACTIVE: Final = ("1 day", "7 days", "28 days")
_LIFECYCLE: Final = ("new", "retained", "resurrected", "dormant")
_SLOW_LAG: Final = timedelta(minutes=1)
"""A lag above this is highlighted: a segment is sealed after a second and then loaded immediately."""


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    name: str
    value: str
    note: str
    course: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A drawing and its figures."""

    drawing: Markup
    legend: Markup
    headings: Sequence[str]
    rows: Sequence[tuple[str, bool, Sequence[str]]]
    """The rows of the table: name, whether it is complete, and cells."""


@dataclass(frozen=True)
class Check:
    """A line in the section on the pipeline's health."""

    name: str
    value: str
    note: str
    good: bool


def render(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "count": figures.count, "share": figures.share, "duration": figures.duration,
        "milliseconds": figures.milliseconds, "day": _day,
        "percent": lambda value: round(float(value or 0) * 100, 1),
    }  # fmt: skip
    environment.globals["spark"] = charts.spark
    folder = files("loader.see")
    template = environment.from_string(folder.joinpath("page.html").read_text("utf-8"))
    return template.render(
        report=report,
        style=Markup(folder.joinpath("page.css").read_text("utf-8")),
        span=_span(report),
        tiles=list(_tiles(report)),
        events=_events(report) if report.trend.rows else None,
        active=_active(report),
        lifecycle=_lifecycle(report),
        requests=list(_requests(report)),
        cohorts=_cohorts(report),
        weeks=range(RETENTION_WEEKS + 1),
        within=figures.duration(FUNNEL_WITHIN),
        anomalies=list(_anomalies(report)),
        missed=WHAT_ANOMALIES_MISS,
        checks=list(_checks(report)),
        commands=_commands(report),
    ) + "\n"  # fmt: skip


def _day(value: date) -> str:
    return f"{value.day} {value:%b}"


def _span(report: Report) -> str:
    zone = report.period.zone
    first = report.period.since.astimezone(zone)
    last = (report.period.until - timedelta(microseconds=1)).astimezone(zone)
    year = "" if first.year == last.year else f" {first.year}"
    return f"{first.day} {first:%B}{year} to {last.day} {last:%B} {last.year}"


def _tiles(report: Report) -> Iterator[Tile]:
    by_bucket = dict.fromkeys(report.buckets(), 0)
    for (starts, _), events in report.events_by().items():
        by_bucket[starts] += events
    whole = [by_bucket[starts] for starts, complete in report.buckets().items() if complete]
    before = figures.change(report.events, report.events_before)
    yield Tile("Events", figures.count(report.events), f"{before} on the {_length(report)} before", whole)
    days = [row for row in report.active.rows if row[5]] or report.active.rows
    if days:
        _, dau, _, mau, stickiness, _ = days[-1]
        note = f"{figures.count(dau)} on {_day(days[-1][0])}, {figures.share(stickiness)} of them"
        yield Tile("Active users, 28 days", figures.count(mau), note, [row[3] for row in days])
    requests = sum(row[2] for row in report.requests.rows)
    failed = sum(row[3] for row in report.requests.rows)
    rate = figures.share(failed / requests if requests else None, 2)
    yield Tile("Requests, 24 hours", figures.count(requests), f"{rate} failed")
    lag = report.pipeline
    if lag.lag_half is not None:
        note = f"for half of the events; {figures.duration(lag.lag_most)} for 99%"
        yield Tile("Loaded after", figures.duration(lag.lag_half), note)
    lost = lag.rejected + sum(number for _, number in lag.drops)
    note = (
        f"{figures.count(lag.rejected)} rejected, {figures.count(lost - lag.rejected)} dropped by an emitter"
    )
    yield Tile("Lines not loaded", figures.count(lost), note)


def _length(report: Report) -> str:
    days = round((report.period.until - report.period.since) / timedelta(days=1))
    return f"{days} days" if days != 1 else "day"


def _events(report: Report) -> Chart:
    found, buckets = report.events_by(), report.buckets()
    series = [*report.types(), *([OTHERS] if any(kind == OTHERS for _, kind in found) else [])]
    values = [
        {"day": day, "name": kind, "value": found.get((day, kind), 0), "complete": complete}
        for day, complete in buckets.items()
        for kind in series
    ]
    rows = [
        (_day(day), complete, [figures.count(found.get((day, kind), 0)) for kind in series])
        for day, complete in buckets.items()
    ]
    drawing = charts.bars(f"Events by type and {report.bucket}, {_span(report)}", values, series)
    return Chart(drawing, charts.legend(series), [report.bucket, *series], rows)


def _active(report: Report) -> Chart:
    days = report.active.rows
    values = [
        {"day": row[0], "name": name, "value": row[at]}
        for row in days
        if row[5]  # a day that has not ended would look like a decline
        for at, name in enumerate(_ACTIVE, 1)
    ]
    rows = [(_day(row[0]), row[5], [*map(figures.count, row[1:4]), figures.share(row[4])]) for row in days]
    drawing = charts.lines(f"Active users of 1, 7 and 28 days, {_span(report)}", values, _ACTIVE)
    return Chart(drawing, charts.legend(_ACTIVE), ["day", *_ACTIVE, "1 of 28"], rows)


def _lifecycle(report: Report) -> Chart:
    weeks = list(dropwhile(lambda row: not any(row[1:5]), report.lifecycle.rows))  # before the first event
    values = [
        {"day": row[0], "name": name, "value": -row[at] if name == "dormant" else row[at], "complete": row[5]}
        for row in weeks
        for at, name in enumerate(_LIFECYCLE, 1)
    ]
    rows = [(_day(row[0]), row[5], [*map(figures.count, row[1:5])]) for row in weeks]
    drawing = charts.bars("New, retained, resurrected and dormant users by week", values, _LIFECYCLE)
    return Chart(drawing, charts.legend(_LIFECYCLE), ["week of", *_LIFECYCLE], rows)


def _requests(report: Report) -> Iterator[dict[str, Any]]:
    slowest = max((row[7] or 0 for row in report.requests.rows), default=0) or 1
    for endpoint, method, requests, errors, rate, *times in report.requests.rows:
        yield {
            "endpoint": endpoint or figures.NONE, "method": method or "", "requests": requests,
            "errors": errors,
            "rate": figures.share(rate, 2), "bad": (rate or 0) >= 0.01, "times": times,
            "marks": [round((time or 0) / slowest * 100, 1) for time in times],
        }  # fmt: skip


def _cohorts(report: Report) -> Mapping[tuple[date, int], Mapping[int, Mapping[str, Any]]]:
    found: dict[tuple[date, int], dict[int, Mapping[str, Any]]] = {}
    for cohort, size, number, users, rate, complete in report.retention.rows:
        found.setdefault((cohort, size), {})[number] = {"users": users, "rate": rate, "complete": complete}
    return found


def _anomalies(report: Report) -> Iterator[dict[str, Any]]:
    zone = report.period.zone
    for starts, ends, kind, events, expected, z in report.anomalies.rows:
        first, last = starts.astimezone(zone), ends.astimezone(zone)
        yield {
            "type": kind, "when": f"{first:%a} {_day(first)}, {first:%H:%M} to {last:%H:%M}",
            "events": events,
            "expected": expected, "z": f"{z:+.1f}",
        }  # fmt: skip


def _checks(report: Report) -> Iterator[Check]:
    pipeline, zone = report.pipeline, report.period.zone
    if pipeline.lag_half is None:
        yield Check("Lag", figures.NONE, "no segment was loaded in the last 24 hours", good=True)
    else:
        most = figures.duration(pipeline.lag_most)
        note = f"from the call to the table, half of the last 24 hours' events; 99%: {most}"
        yield Check("Lag", figures.duration(pipeline.lag_half), note, good=pipeline.lag_half <= _SLOW_LAG)
    last = pipeline.last_loaded_at
    when = f"the last at {last.astimezone(zone):%Y-%m-%d %H:%M}" if last else "none in this range"
    counts = f"{figures.count(pipeline.events)} events, {figures.count(pipeline.metrics)} metrics"
    yield Check("Lines loaded", figures.count(pipeline.lines), f"{counts}; {when}", good=True)
    yield Check(
        "Duplicates", figures.count(pipeline.duplicates), "lines whose row existed; harmless", good=True
    )
    note = "see `loader rejects list` for the reasons" if pipeline.rejected else "every line was accepted"
    yield Check("Rejected", figures.count(pipeline.rejected), note, good=not pipeline.rejected)
    dropped = sum(number for _, number in pipeline.drops)
    causes = ", ".join(f"{cause} {figures.count(number)}" for cause, number in pipeline.drops)
    yield Check(
        "Dropped by emitters", figures.count(dropped), causes or "no line was dropped", good=not dropped
    )
    missing = pipeline.missing_segments
    note = (
        f"of {pipeline.missing_writers} writers: lost, or not loaded yet"
        if missing
        else "every segment was loaded"
    )
    yield Check("Missing segments", figures.count(missing), note, good=not missing)
    oldest = pipeline.oldest_touched
    note = f"the oldest: {oldest.astimezone(zone):%Y-%m-%d %H:%M}" if oldest else "the rollups are up to date"
    if pipeline.without_rollups:
        note = "no rollups were computed yet: every answer reads rows"
    yield Check("Hours to roll up", figures.count(pipeline.touched_hours), note, good=True)


def _commands(report: Report) -> Mapping[str, str]:
    """Return the command for each part of the page, to repeat it."""
    zone = report.period.zone
    since, until = (
        quote(moment.astimezone(zone).isoformat(timespec="seconds"))
        for moment in (report.period.since, report.period.until)
    )
    tz = "" if report.period.tz == "UTC" else f" --tz {quote(report.period.tz)}"
    steps = " ".join(quote(str(row[2])) for row in report.funnel.rows)
    return {
        "events": f"loader ask trend --since {since} --until {until}{tz}",
        "active": f"loader ask active --since {since} --until {until}{tz}",
        "lifecycle": f"loader ask lifecycle --until {until}{tz}",
        "requests": f"loader ask requests --since 24h{tz}",
        "retention": f"loader ask retention{tz}",
        "funnel": f"loader ask funnel {steps} --within 1d --since {since} --until {until}{tz}",
        "anomalies": f"loader ask anomalies{tz}",
        "pipeline": "loader status",
    }
