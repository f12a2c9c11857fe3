"""Long lists of cases: some of them by default, all of them with the long marker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(step: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters, all but the first of each `step` behind the long marker.

    A name or a value is a case of its own; a tuple is one case of several parameters.
    """
    return [
        case if place % step == 0
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for place, case in enumerate(cases)
    ]  # fmt: skip
