"""Durable product analytics and metrics that never block a request; see README.md.

Names are imported on first use. The loader uses other modules of this package; importing these would take
longer than some of its commands take to run.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spool.emitter import Emitter, Stats, get_emitter
    from spool.identity import analytics_uuid
    from spool.service import AnalyticsService, get_analytics_service
    from spool.settings import Settings
else:
    _MODULES = {
        "Emitter": "emitter", "Stats": "emitter", "get_emitter": "emitter",
        "AnalyticsService": "service", "get_analytics_service": "service", "Settings": "settings",
        "analytics_uuid": "identity",
    }  # fmt: skip

    def __getattr__(name):  # noqa: ANN001, ANN202  # hidden: type checkers would accept every name
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(f"spool.{_MODULES[name]}"), name)
        return value

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *_MODULES})


__all__ = [
    "AnalyticsService",
    "Emitter",
    "Settings",
    "Stats",
    "analytics_uuid",
    "get_analytics_service",
    "get_emitter",
]
