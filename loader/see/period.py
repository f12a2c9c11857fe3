"""The time range of a question: half-open, between two instants, with days of one time zone.

A date, or an age in days or weeks, denotes local midnight in the zone; an age in hours or minutes is exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

from loader.errors import UsageError

_AGE: Final = re.compile(r"(\d{1,7})([wdhm])", re.ASCII)
_UNITS: Final = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes"}
_DURATION: Final = re.compile(r"(\d{1,7})([wdhms])", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_FORMS: Final = (
    "write a date (2026-11-25), a time (2026-11-25T08:00, with or without an offset), an age (28d, 24h), "
    "today, yesterday or now"
)


@dataclass(frozen=True)
class Period:
    """Events with `since <= timestamp < until`, in days of the zone `tz` (an IANA name)."""

    since: datetime
    until: datetime
    tz: str

    @property
    def zone(self) -> tzinfo:
        """The time zone as a ZoneInfo."""
        return zone(self.tz)

    def __str__(self) -> str:
        first, last = (moment.astimezone(self.zone) for moment in (self.since, self.until))
        return f"{_shown(first)} to {_shown(last)}, {self.tz}"


def period(since: str, until: str, tz: str, now: datetime | None = None) -> Period:
    """Parse the range between two moments written by a user. Raises UsageError."""
    where, now = zone(tz), now or datetime.now(UTC)
    first, last = (
        instant(text, where, now, option) for text, option in ((since, "--since"), (until, "--until"))
    )
    if first >= last:
        raise UsageError(f'--since "{since}" is not before --until "{until}": choose an earlier --since')
    return Period(first, last, tz)


def zone(name: str) -> tzinfo:
    """Return a time zone by its IANA name. Raises UsageError."""
    if name == "UTC":
        return UTC  # does not need a time zone database
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # missing, not a name, or a directory
        raise UsageError(f'"{name}" is not a time zone: give an IANA name, such as Europe/Berlin') from None


def instant(text: str, where: tzinfo, now: datetime, option: str) -> datetime:
    """Parse a moment, and return it in UTC. Raises UsageError, which names the option."""
    try:
        return _instant(text.strip(), where, now).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(f'{option} "{text}" is not a point in time: {_FORMS}') from None


def _instant(text: str, where: tzinfo, now: datetime) -> datetime:
    today = now.astimezone(where).date()
    named = {"today": today, "yesterday": today - timedelta(days=1)}
    if text == "now":
        return now
    if text in named:
        return midnight(named[text], where)
    if age := _AGE.fullmatch(text):
        span = timedelta(**{_UNITS[age[2]]: int(age[1])})
        return midnight(today - span, where) if age[2] in "wd" else now - span
    if _DATE.fullmatch(text):
        return midnight(date.fromisoformat(text), where)
    if not _DATE.match(text):
        raise ValueError(text)  # fromisoformat also accepts week dates and dates without dashes
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=where)


def midnight(day: date, where: tzinfo) -> datetime:
    """Return the first moment of a day: 01:00 if clocks skip midnight, the first midnight if there are two."""
    return datetime.combine(day, time(), where)


def duration(text: str, option: str) -> timedelta:
    """Parse a duration such as 30m, 1d or 90s. Raises UsageError, which names the option."""
    parts = _DURATION.fullmatch(text)
    if parts is None or not int(parts[1]):
        raise UsageError(f'{option} "{text}" is not a duration: write 1d, 12h, 30m or 90s')
    return timedelta(**{(_UNITS | {"s": "seconds"})[parts[2]]: int(parts[1])})


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}" if moment.time() == time() else f"{moment:%Y-%m-%d %H:%M}"
