"""Formats figures for people, also as bars and sparklines of text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import date, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

NONE: Final = "-"
"""Shown for a value that does not exist, such as a rate with a denominator of zero."""
_LEVELS: Final = "▁▂▃▄▅▆▇█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"


def count(value: Decimal | float | None) -> str:
    """Format a count: 1,234."""
    return NONE if value is None else f"{round(value):,}"


def share(value: Decimal | float | None, digits: int = 0) -> str:
    """Format a share as a percentage; never rounded to 0 % or 100 %."""
    if value is None:
        return NONE
    shown = f"{value:.{digits}%}"
    if shown == f"{0:.{digits}%}" and value > 0:
        return f"<{10**-digits:.{digits}f}%"
    return f">{100 - 10**-digits:.{digits}f}%" if shown == f"{1:.{digits}%}" and value < 1 else shown


def change(now: float, before: float) -> str:
    """Format the change from an earlier value: +12 %, or `new` if there was none."""
    if not before:
        return "new" if now else NONE
    return f"{now / before - 1:+.0%}"


def duration(value: timedelta | None) -> str:
    """Format a duration in the largest suitable unit."""
    if value is None:
        return NONE
    seconds = value.total_seconds()
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and seconds else f"{amount:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def milliseconds(value: float | None) -> str:
    """Format milliseconds, with a decimal for small values."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def bucket(starts: date | datetime, where: tzinfo) -> str:
    """Return the name of a bucket: its first day, or its local time."""
    if not isinstance(starts, datetime):
        return f"{starts:%Y-%m-%d}"
    return f"{starts.astimezone(where):%Y-%m-%d %H:%M}"


def local_day(starts: date | datetime, where: tzinfo) -> date:
    """Return the first day of a bucket of a day or more."""
    return starts.astimezone(where).date() if isinstance(starts, datetime) else starts


def draws_blocks() -> bool:
    """Whether standard output can encode the characters of bars and sparklines."""
    try:
        _LEVELS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def spark(values: Sequence[float], width: int) -> str:
    """Return a sparkline; neighbouring values are added up if there are more than `width`."""
    step = -(-len(values) // width) if values else 1
    columns = [sum(values[at : at + step]) for at in range(0, len(values), step)]
    peak = max(columns, default=0)
    if not peak or not draws_blocks():
        return "" if not draws_blocks() else _LEVELS[0] * len(columns)
    return "".join(_LEVELS[min(7, round(value / peak * 7))] for value in columns)


def bar(value: float | Decimal, peak: float | Decimal, width: int) -> str:
    """Return a bar of up to `width` characters."""
    eighths = round(float(value) / float(peak) * width * 8) if peak else 0
    if not draws_blocks():
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def plain(value: Any, where: tzinfo) -> Any:
    """Return a value for JSON and CSV: local time with its offset, durations in seconds, ids as text."""
    if isinstance(value, datetime):
        return value.astimezone(where).isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, date | UUID) else value
