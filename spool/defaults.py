"""Process-wide values that an emitter adds to every event and metric: service, release and environment.

An emitter without defaults pays nothing for them: only one with defaults looks up the current scope in
another way. A bound context and the defaults are merged once per bound context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spool.context import Complete, Context, Scope, beside
from spool.redaction import DEFAULTS
from spool.settings import Settings


class Defaults:
    """The default values, and the current scope with them."""

    __slots__ = ("_bound", "_nobody", "values")

    def __init__(self, values: dict[str, str], bound: Callable[[], Scope | None]) -> None:
        self.values = values
        self._bound = bound
        self._nobody = Scope(Context(defaults=values))

    @classmethod
    def of(cls, settings: Settings, bound: Callable[[], Scope | None]) -> Defaults | None:
        """Return the defaults in the settings, or None if there are none; `bound` returns the current scope."""
        values = {name: value for name in DEFAULTS if (value := getattr(settings, name))}
        return cls(values, bound) if values else None

    def scope_in_force(self) -> Scope:
        """Return the current scope, or an empty one, with the defaults."""
        inner = self._bound()
        if inner is None:
            return self._nobody
        if type(inner) is Complete:
            return inner
        context = inner.context
        known = context.beside_defaults
        if known is None or known.context.defaults is not self.values:
            context.beside_defaults = known = Scope(context.with_defaults(self.values))
        return known

    def beside(self, labels: Any) -> Any:
        """Return a metric's labels with the defaults; the metric's own labels win."""
        return beside(self.values, labels)
