"""Counts of altered values in emitted lines: redacted values, and values replaced by the name of their type.

Counting needs no lock: `counts[name] += 1` on a defaultdict with a key of exact type `str` runs no Python
code that another thread or a signal handler could interrupt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from spool.log import Warnings

_NAMES: Final = 100
"""Maximum number of distinct names, because clients may choose keys. Further names count as `other`."""
_NAME_LENGTH: Final = 100
OTHER: Final = "other"


NO_SCOPE: Final = "cannot bind outside of a scope: add AnalyticsMiddleware, or call update() within scope()"


class Alterations:
    """The counts of one process. Safe to use from any thread, signal handler or finalizer."""

    def __init__(self) -> None:
        self._redacted: defaultdict[str, int] = defaultdict(int)
        self._converted: defaultdict[str, int] = defaultdict(int)
        self._logged = 0
        self._unbound: defaultdict[str, int] = defaultdict(int)
        self._unbound_logged = 0
        self._unbound_warnings = Warnings()
        self._warnings = Warnings()

    def count_redacted(self, key: str) -> None:
        """Count a value that was redacted under `key`, an exact `str`."""
        _count(self._redacted, key)

    def count_converted(self, type_name: str) -> None:
        """Count a value without a JSON form that was written as `type_name` (an exact `str`)."""
        _count(self._converted, type_name)

    def redacted(self) -> Mapping[str, int]:
        """Return how many values were redacted, by key."""
        return dict(self._redacted)

    def converted(self) -> int:
        """Return how many values were written as the name of their type."""
        return sum(dict(self._converted).values())

    def count_unbound(self) -> None:
        """Count a call of `update` outside of a scope."""
        _count(self._unbound, "update")

    def unbound(self) -> int:
        """Return the number of `update` calls that bound nothing."""
        return sum(dict(self._unbound).values())

    def log(self) -> None:
        """Log calls that bound nothing and types without a JSON form, each at most once a minute.

        Not to be called by the thread that emits.
        """
        unbound = self.unbound()
        if unbound > self._unbound_logged and self._unbound_warnings.is_due():
            self._unbound_logged = unbound
            self._unbound_warnings.log("analytics %s; %d calls so far", NO_SCOPE, unbound)
        total = self.converted()
        if total > self._logged and self._warnings.is_due():
            self._logged = total
            types = ", ".join(f'"{name}" ({count})' for name, count in sorted(dict(self._converted).items()))
            self._warnings.log("analytics values without a JSON form, written as their type: %s", types)


def _count(counts: defaultdict[str, int], name: str) -> None:
    known = name in counts or (len(counts) < _NAMES and len(name) <= _NAME_LENGTH)
    counts[name if known else OTHER] += 1
