"""The types of the public calls, so that mypy and pyright find a wrong argument."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, SupportsFloat, TypedDict
from uuid import UUID

Id = UUID | str | int
"""The application's id of a person, family or session."""
EventId = UUID | str
Moment = datetime | str
"""An aware datetime, or RFC 3339 text with an offset."""
Number = int | float | Decimal | SupportsFloat
"""A metric's value; numpy numbers are accepted, text is not."""
MetricType = Literal["counter", "gauge", "timer", "histogram"]
Metadata = Mapping[Any, object]
"""Metadata or labels: names with values that have a JSON form (spool/convert.py)."""


class Who(TypedDict, total=False):
    """The arguments that every event takes in addition to its own fields. Omitted ids come from the context."""

    user_id: Id | None
    family_unit_id: Id | None
    session_id: Id | None
    event_id: EventId | None
    timestamp: Moment | None
