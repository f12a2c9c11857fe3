"""Counts of lines by outcome, shared by loads, the ledger, `status` and the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Final

LARGEST_SUM: Final = 2000
"""Kinds of drops counted separately: 100 names per cause, and room for metrics that people write themselves."""


@dataclass(frozen=True)
class Counts:
    """Lines by outcome. Each line is counted once, so the sum is the number of lines."""

    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    rejected: int = 0
    erased: int = 0
    expired: int = 0
    """Lines below the low-water mark of their table, which were not loaded."""

    @property
    def lines(self) -> int:
        return self.events + self.metrics + self.duplicates + self.rejected + self.erased + self.expired

    @property
    def rows(self) -> int:
        return self.events + self.metrics

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Loaded:
    """The result of a load: counts of its lines, lines that the ledger already had, and bytes."""

    counts: Counts = field(default_factory=Counts)
    known: int = 0
    bytes: int = 0
    dropped: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """Lines dropped by emitters, by cause and name, as reported by the new rows."""

    def __add__(self, other: Loaded) -> Loaded:
        return Loaded(
            self.counts + other.counts, self.known + other.known, self.bytes + other.bytes,
            _sum(self.dropped, other.dropped) if other.dropped else self.dropped,
        )  # fmt: skip

    def facts(self) -> dict[str, int]:
        """Return the counts by the names used in commands and log lines; `lines` includes the known lines."""
        counts = self.counts
        return {
            "lines": counts.lines + self.known, "events": counts.events, "metrics": counts.metrics,
            "duplicates": counts.duplicates, "rejected": counts.rejected, "erased": counts.erased,
            "expired": counts.expired,
            "known": self.known,
        }  # fmt: skip


def _sum(
    some: Mapping[tuple[str, str], int], more: Mapping[tuple[str, str], int]
) -> Mapping[tuple[str, str], int]:
    total = Counter(some)
    for kind, count in more.items():
        total[kind if kind in total or len(total) < LARGEST_SUM else ("other", "other")] += count
    return total
