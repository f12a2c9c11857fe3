"""What became of lines: the one value that a load, the ledger, `status` and the metrics share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Final

LARGEST_SUM: Final = 2000
"""Kinds of drops with a count of their own: 100 names for each cause, and room for what people write themselves."""


@dataclass(frozen=True)
class Counts:
    """Lines by what became of them. Each line is counted once, so their sum is the number of lines."""

    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    rejected: int = 0
    expired: int = 0
    """Lines below the low-water mark of their table, which were not loaded."""

    @property
    def lines(self) -> int:
        return self.events + self.metrics + self.duplicates + self.rejected + self.expired

    @property
    def rows(self) -> int:
        return self.events + self.metrics

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Loaded:
    """What a load did: the counts of its lines, the lines that the ledger already knew, and their bytes."""

    counts: Counts = field(default_factory=Counts)
    known: int = 0
    bytes: int = 0
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Lines that emitters dropped, by cause and name, of the new rows that report them."""

    def __add__(self, other: Loaded) -> Loaded:
        return Loaded(
            self.counts + other.counts, self.known + other.known, self.bytes + other.bytes,
            _sum(self.dropped, other.dropped) if other.dropped else self.dropped,
        )  # fmt: skip

    def facts(self) -> dict[str, int]:
        """Return the counts by the names that commands and log lines use; `lines` includes the known ones."""
        counts = self.counts
        return {
            "lines": counts.lines + self.known, "events": counts.events, "metrics": counts.metrics,
            "duplicates": counts.duplicates, "rejected": counts.rejected, "expired": counts.expired,
            "known": self.known,
        }  # fmt: skip


def _sum(
    some: Mapping[tuple[str, str], int], more: Mapping[tuple[str, str], int]
) -> Mapping[tuple[str, str], int]:
    total = Counter(some)
    for kind, count in more.items():
        total[kind if kind in total or len(total) < LARGEST_SUM else ("other", "other")] += count
    return total
