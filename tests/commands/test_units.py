"""The units in the output of `loader status`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from loader.cli import units


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"), (7, "7 B"), (999, "999 B"), (1000, "1 kB"), (9949, "9.9 kB"), (9999, "10 kB"),
        (345_000, "345 kB"), (999_499, "999 kB"), (999_999, "1 MB"), (2.5e9, "2.5 GB"), (7e15, "7000 TB"),
    ],
)  # fmt: skip
def test_sizes(number: float, text: str) -> None:
    assert units.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (59.9, "60 s"),
        (60, "1 min"),
        (150, "2.5 min"),
        (5000, "1.4 h"),
        (9e6, "104 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_facts_have_their_units_behind_their_values() -> None:
    loaded = datetime.now(UTC) - timedelta(minutes=2)
    facts = {
        "sealed_bytes": 345_000,
        "lag_seconds": 120.0,
        "rows_per_second": 4.71,
        "built": True,
        "lines": 12345,
    }
    readable = units.readable(facts | {"last_loaded_at": loaded, "error": None})
    assert readable.pop("last_loaded").startswith("2 min ago (2")
    assert readable == {
        "sealed": "345 kB", "lag": "2 min", "rate": "4.7 rows/s", "built": True, "lines": 12345, "error": None,
    }  # fmt: skip
