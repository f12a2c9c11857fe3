"""Dropped lines, counted by cause and name by the emitting thread, logged and reported by housekeeping.

The name is the event type or the metric's name, if it is valid. At most MAX_NAMES distinct names are counted;
all others count as OTHER. So the counts are bounded, whatever names an application uses.

Each drop is reported in four ways:

    log      one line per cause, name and minute, and a summary when the process exits
    metric   `spool_dropped_count`, labelled cause and name, written to the spool: `unreported`, `reported`
    account  the writer's file beside the spool, which survives SIGKILL (spool/account.py)
    stats    `Emitter.stats()`
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from spool.log import Warnings, logger
from spool.record import NAME

if TYPE_CHECKING:
    from spool.account import Account

REPORT_INTERVAL: Final = 1.0
"""Seconds for which drops are collected before metrics report them."""
MAX_NAMES: Final = 100
OTHER: Final = "other"
_SUMMARIZED: Final = 10
"""Maximum number of kinds of drops that the summary names."""


class Kind(NamedTuple):
    """The key by which drops are counted."""

    cause: str
    name: str


_TOO_DEEP: Final = Kind("recursion", OTHER)


class Report(NamedTuple):
    """The drops that one metric reports: those of a kind from number `begin` (excluded) to `end`."""

    kind: Kind
    begin: int
    end: int


class Drops:
    """The drops of one process. Safe to use from any thread, signal handler or finalizer."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        # `counts[kind] += 1` on a defaultdict runs no Python code that a handler could interrupt.
        self._counts: defaultdict[Kind, int] = defaultdict(int)
        self._reported: defaultdict[Kind, int] = defaultdict(int)
        self._logged: defaultdict[Kind, int] = defaultdict(int)
        self._messages: dict[Kind, str] = {_TOO_DEEP: "the recursion limit is too near to encode a line"}
        self._warnings: defaultdict[Kind, Warnings] = defaultdict(Warnings)
        self._names: set[str] = set()
        self._report_at = float("inf")
        self._account: Account | None = None
        self.too_deep = 0
        """Lines dropped so close to the recursion limit that not even `add` could be called."""
        self._too_deep_counted = 0

    def add(self, cause: str, name: object, message: str, *, report: bool) -> bool:
        """Count a dropped line. Return whether housekeeping must be notified.

        `report` is false for drops that no metric should report, such as in a test that records.
        """
        with self._lock:
            kind = Kind(cause, self._counted_name(name))
            before = self._counts[kind]
            self._messages[kind] = message
            self._count(kind, 1, report=report)
            return before in (self._reported[kind], self._logged[kind])

    def _count(self, kind: Kind, count: int, *, report: bool) -> None:
        self._counts[kind] += count
        if not report:
            self._reported[kind] += count
        elif self._report_at == float("inf"):
            self._report_at = time.monotonic() + REPORT_INTERVAL
        if self._account is not None:
            self._account.count(kind, self._counts, self._reported)

    def _counted_name(self, name: object) -> str:
        if not isinstance(name, str) or not NAME.fullmatch(plain := str.__str__(name)):
            return OTHER
        if plain not in self._names:
            if len(self._names) >= MAX_NAMES:
                return OTHER
            self._names.add(plain)
        return plain

    def _count_too_deep(self) -> None:
        """Count the drops near the recursion limit. Not for an emitting thread, which may be near it again."""
        with self._lock:
            count = self.too_deep - self._too_deep_counted
            if count:
                self._too_deep_counted += count
                self._count(_TOO_DEEP, count, report=True)

    def count_in(self, account: Account | None) -> None:
        """Write all past and future drops to the given account, or to none."""
        with self._lock:
            self._account = account
            for kind in list(self._counts) if account is not None else ():
                account.count(kind, self._counts, self._reported)  # type: ignore[union-attr]

    # ---- read by callers ----------------------------------------------------------------------------

    def counts(self) -> Mapping[str, int]:
        """Return how many lines were dropped, by cause."""
        by_cause: defaultdict[str, int] = defaultdict(int)
        for kind, count in self.by_kind().items():
            by_cause[kind.cause] += count
        return dict(by_cause)

    def by_kind(self) -> dict[Kind, int]:
        """Return how many lines were dropped, by cause and name."""
        counts = dict(self._counts)
        if uncounted := self.too_deep - self._too_deep_counted:
            counts[_TOO_DEEP] = counts.get(_TOO_DEEP, 0) + uncounted
        return counts

    # ---- log ----------------------------------------------------------------------------------------

    def log(self) -> None:
        """Log each kind whose last warning is long enough ago. Not to be called by the thread that emits."""
        self._count_too_deep()
        for kind, count in self._unlogged():
            if self._warnings[kind].is_due():
                self._logged[kind] = count
                self._warnings[kind].log(
                    'analytics line dropped (%s) of "%s": %s; %d so far', *kind, self._messages[kind], count
                )

    def seconds_until_log(self) -> float | None:
        """Return the seconds until `log` has something to log, or None if nothing was dropped since its last call."""
        waits = [self._warnings[kind].seconds() for kind, _ in self._unlogged()]
        return max(0.0, min(waits)) if waits else None

    def _unlogged(self) -> Iterator[tuple[Kind, int]]:
        counts = dict(self._counts)  # one C call: other threads may add a kind
        return ((kind, count) for kind, count in counts.items() if count > self._logged[kind])

    def log_summary(self) -> None:
        """Log the total of dropped lines, if there are any. Called when the process exits."""
        counts = sorted(self.by_kind().items(), key=lambda item: -item[1])
        if not counts:
            return
        named = [f"{kind.cause} {kind.name} {count}" for kind, count in counts[:_SUMMARIZED]]
        named += [f"and {len(counts) - _SUMMARIZED} other kinds"] * (len(counts) > _SUMMARIZED)
        with contextlib.suppress(Exception):
            logger().warning(
                "analytics lines dropped by this process: %d (%s)",
                sum(count for _, count in counts), ", ".join(named),
            )  # fmt: skip

    # ---- metrics ------------------------------------------------------------------------------------

    def is_waiting(self) -> bool:
        """Whether there are drops that no metric has reported yet."""
        return self._report_at < float("inf") or self.too_deep > self._too_deep_counted

    def seconds_until_report(self) -> float:
        """Return the seconds until the waiting drops should be reported."""
        return max(0.0, self._report_at - time.monotonic())

    def unreported(self) -> list[Report]:
        """Return the drops that no metric has reported yet, repeatedly until they are passed to `reported`."""
        self._count_too_deep()
        with self._lock:
            self._report_at = float("inf")
            return [
                Report(kind, self._reported[kind], count)
                for kind, count in self._counts.items()
                if count > self._reported[kind]
            ]

    def reported(self, report: Report) -> None:
        """Record that a metric has reported these drops."""
        with self._lock:
            self._reported[report.kind] = report.end

    def postpone(self) -> None:
        """Schedule another attempt for drops that could not be reported."""
        self._report_at = time.monotonic() + REPORT_INTERVAL
