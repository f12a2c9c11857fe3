"""An independent implementation of the definitions in Python over all rows."""

from __future__ import annotations

import bisect
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from tests.see.data import Event, Metric

Unit = Callable[[Event], UUID]
UNITS: dict[str, Unit] = {"user": lambda event: event.user, "family": lambda event: event.family}


def local(at: datetime, tz: str) -> datetime:
    return at.astimezone(ZoneInfo(tz))


def bucket(name: str, at: datetime, tz: str) -> date:
    """Return the local day, Monday or first of the month of an instant."""
    day = local(at, tz).date()
    if name == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if name == "month" else day


def following(name: str, day: date) -> date:
    if name == "month":
        return (day.replace(day=1) + timedelta(days=32)).replace(day=1)
    return day + timedelta(days=7 if name == "week" else 1)


def buckets(name: str, since: datetime, until: datetime, tz: str) -> list[date]:
    day, last = bucket(name, since, tz), bucket(name, until - timedelta(microseconds=1), tz)
    found = []
    while day <= last:
        found.append(day)
        day = following(name, day)
    return found


@functools.cache
def midnight(day: date, tz: str) -> datetime:
    """Return the first instant of a local day, found by checking every quarter hour around it."""
    at = datetime(day.year, day.month, day.day, tzinfo=UTC) - timedelta(hours=30)
    while local(at, tz).date() < day:
        at += timedelta(minutes=15)
    return at


def within(
    events: Iterable[Event], since: datetime, until: datetime, types: Sequence[str] | None = None
) -> list[Event]:
    return [
        event
        for event in events
        if since <= event.at < until and (types is None or event.event_type in types)
    ]


def trend(
    events: list[Event], since: datetime, until: datetime, name: str, tz: str, types: list[str] | None
) -> set[Any]:
    found = within(events, since, until, types)
    groups: dict[tuple[Any, str], list[Event]] = defaultdict(list)
    for event in found:
        groups[_start(name, event.at, tz), event.event_type].append(event)
    if name == "hour":
        hours = int((until - since) / timedelta(hours=1)) + 1
        starts = {
            _start(name, min(since + timedelta(hours=n), until - timedelta(microseconds=1)), tz)
            for n in range(hours)
        }
    else:
        starts = {midnight(day, tz) for day in buckets(name, since, until, tz)}
    return {
        (start, kind, len(group), len({e.user for e in group}), len({e.family for e in group}))
        for start in starts for kind in {*(event.event_type for event in found), *(types or ())}
        for group in [groups.get((start, kind), [])]
    }  # fmt: skip


def _start(name: str, at: datetime, tz: str) -> datetime:
    if name == "hour":
        return at.replace(minute=0, second=0, microsecond=0)
    return midnight(bucket(name, at, tz), tz)


def active(
    events: list[Event], since: datetime, until: datetime, tz: str, who: str, types: list[str] | None
) -> list[Any]:
    days: dict[date, set[UUID]] = defaultdict(set)
    for event in events:
        if event.at < until and (types is None or event.event_type in types):
            days[local(event.at, tz).date()].add(UNITS[who](event))

    def seen(day: date, length: int) -> int:
        return len(set[UUID]().union(*(days[day - timedelta(days=n)] for n in range(length))))

    return [(day, seen(day, 1), seen(day, 7), seen(day, 28)) for day in buckets("day", since, until, tz)]


def _active_buckets(
    events: list[Event], until: datetime, name: str, tz: str, who: str, types: list[str] | None
) -> dict[UUID, set[date]]:
    found: dict[UUID, set[date]] = defaultdict(set)
    for event in events:
        if event.at < until and (types is None or event.event_type in types):
            found[UNITS[who](event)].add(bucket(name, event.at, tz))
    return found


def lifecycle(
    events: list[Event],
    since: datetime,
    until: datetime,
    name: str,
    tz: str,
    who: str,
    types: list[str] | None,
) -> list[Any]:
    found = _active_buckets(events, until, name, tz, who, types)
    rows, before = [], None
    for day in buckets(name, since, until, tz):
        before = max((d for days in found.values() for d in days if following(name, d) == day), default=None)
        counts = Counter(_state(days, day, before) for days in found.values())
        rows.append((day, *(counts[state] for state in ("new", "retained", "resurrected", "dormant"))))
    return rows


def _state(days: set[date], day: date, before: date | None) -> str:
    if day in days:
        if min(days) == day:
            return "new"
        return "retained" if before in days else "resurrected"
    return "dormant" if before in days else "absent"


def retention(
    events: list[Event], since: datetime, until: datetime, name: str, tz: str, periods: int,
    starting: list[str] | None, coming: list[str] | None, unbounded: bool, who: str,
) -> list[Any]:  # fmt: skip
    first = _active_buckets(events, until, name, tz, who, starting)
    back = _active_buckets(events, until, name, tz, who, coming)
    cohorts: dict[date, list[UUID]] = defaultdict(list)
    for unit, days in first.items():
        if min(days) >= bucket(name, since, tz):
            cohorts[min(days)].append(unit)
    rows = []
    for cohort, units in sorted(cohorts.items()):
        day = cohort
        for period in range(periods + 1):
            if midnight(day, tz) >= until:
                break
            users = len(units) if not period else sum(
                any(d >= day if unbounded else d == day for d in back.get(unit, ())) for unit in units
            )  # fmt: skip
            rows.append((cohort, len(units), period, users, midnight(following(name, day), tz) <= until))
            day = following(name, day)
    return rows


def funnel(
    events: list[Event],
    steps: list[str],
    since: datetime,
    until: datetime,
    window: timedelta,
    strict: bool,
    unit: str,
) -> list[tuple[int, list[float]]]:
    """Return, for each step, how many units reached it, and the seconds from the entry to the step."""
    by_unit: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        key = event.session if unit == "session" else UNITS[unit](event)
        if key is not None:
            by_unit[key].append(event)
    reached: list[list[float]] = [[] for _ in steps]
    for history in by_unit.values():
        history.sort(key=lambda e: (e.at, steps.index(e.event_type) if e.event_type in steps else 99))
        for step, seconds in enumerate(_first_times(history, steps, since, until, window, strict)):
            reached[step].append(seconds)
    return [(len(times), sorted(times)) for times in reached]


def _first_times(
    history: list[Event], steps: list[str], since: datetime, until: datetime, window: timedelta, strict: bool
) -> list[float]:
    """Follow every entry to its end; of the entries that reach a step first, the latest counts."""
    best: list[tuple[int, int] | None] = [None] * len(steps)  # positions of the event and of its entry
    for start, entry in enumerate(history):
        if entry.event_type != steps[0] or not since <= entry.at < until:
            continue
        step = 0
        for position, event in enumerate(history[start:], start):
            if event.at - entry.at > window:
                break
            if event.event_type == steps[step]:
                known = best[step]
                if known is None or position < known[0] or (position == known[0] and start > known[1]):
                    best[step] = (position, start)
                step += 1
                if step == len(steps):
                    break
            elif strict and step:
                break
    times = []
    for found in best:
        if found is None:
            break
        times.append((history[found[0]].at - history[found[1]].at).total_seconds())
    return times


def median(times: Sequence[float], share: float) -> float | None:
    """Return the median, like percentile_cont."""
    if not times:
        return None
    place = share * (len(times) - 1)
    low = int(place)
    high = min(low + 1, len(times) - 1)
    return times[low] + (times[high] - times[low]) * (place - low)


def sessions(events: list[Event], since: datetime, until: datetime) -> set[Any]:
    groups: dict[Any, list[datetime]] = defaultdict(list)
    for event in events:
        if event.session is not None:
            groups[event.session, event.user].append(event.at)
    return {
        (*key, min(times), max(times), len(times))
        for key, times in groups.items()
        if since <= min(times) < until
    }


def sessions_by_gap(events: list[Event], since: datetime, until: datetime, gap: timedelta) -> set[Any]:
    times: dict[UUID, list[datetime]] = defaultdict(list)
    for event in events:
        times[event.user].append(event.at)
    found = set()
    for user, moments in times.items():
        moments.sort()
        starts = [n for n in range(len(moments)) if n == 0 or moments[n] - moments[n - 1] > gap]
        for start, end in zip(starts, [*starts[1:], len(moments)], strict=True):
            if since <= moments[start] < until:
                found.add((user, moments[start], moments[end - 1], end - start))
    return found


def percentile_disc(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    places = [(n + 1) / len(ordered) for n in range(len(ordered))]
    return ordered[bisect.bisect_left(places, share - 1e-12)]


def requests(
    metrics: list[Metric], since: datetime, until: datetime, start: Callable[[datetime], datetime]
) -> dict[Any, tuple[float, float, list[float]]]:
    """Return requests, errors and durations by start, endpoint and method."""
    found: dict[Any, tuple[float, float, list[float]]] = {}
    for metric in metrics:
        if not since <= metric.at < until:
            continue
        key = (start(metric.at), metric.labels["endpoint"], metric.labels["method"])
        count, errors, durations = found.get(key, (0, 0, []))
        if metric.name == "api_request_count":
            count += metric.value
            errors += metric.value if int(metric.labels["status"]) >= 500 else 0
        else:
            durations = [*durations, metric.value]
        found[key] = (count, errors, durations)
    return found
