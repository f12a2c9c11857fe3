"""Product analytics and metrics that lose nothing and cost the request nothing: see README.md."""

from spool.emitter import Emitter, Stats, get_emitter
from spool.service import AnalyticsService, get_analytics_service
from spool.settings import Settings

__all__ = ["AnalyticsService", "Emitter", "Settings", "Stats", "get_analytics_service", "get_emitter"]
