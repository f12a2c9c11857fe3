"""Formats facts with units: 4.7 rows/s, 345 kB, 2 min ago."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

_SIZES: Final = ("B", "kB", "MB", "GB", "TB")
"""Powers of 1000 (IEC 80000-13)."""
_KILO: Final = 1000
_TIMES: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))
_NAMES: Final = {"sealed_bytes": "sealed", "rows_per_second": "rate", "last_loaded_at": "last_loaded"}


def readable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts with the units moved from the end of the names to the values."""
    return {
        _NAMES.get(name, name.removesuffix("_seconds")): _readable(name, value)
        for name, value in facts.items()
    }


def _readable(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{duration((datetime.now(UTC) - value).total_seconds())} ago ({value:%Y-%m-%d %H:%M:%S%z})"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_seconds"):
        return duration(value)
    return f"{_short(value)} rows/s" if name == "rows_per_second" else value


def size(number: float) -> str:
    """Return bytes as 345 kB."""
    for unit in _SIZES:
        if round(number) < _KILO or unit == _SIZES[-1]:
            break
        number /= _KILO
    return f"{_short(number)} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as 2.5 min."""
    for length, unit in _TIMES:
        if seconds >= length:
            return f"{_short(seconds / length)} {unit}"
    return f"{_short(seconds)} s"


def _short(number: float) -> str:
    """Format with one decimal below 10, unless it is 0, and with none from 10 on."""
    text = f"{number:.1f}".removesuffix(".0")
    return text if len(text) <= len("9.9") else f"{number:.0f}"
