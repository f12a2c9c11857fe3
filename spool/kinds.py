"""The kind of a function, for decorators: whether a call returns a value, a coroutine or a generator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import Enum, auto
from typing import Any


class Kind(Enum):
    """The kind of a function, by the result of a call."""

    RESULT = auto()
    COROUTINE = auto()
    GENERATOR = auto()
    ASYNC_GENERATOR = auto()


_TESTS = (
    (inspect.iscoroutinefunction, Kind.COROUTINE),
    (inspect.isgeneratorfunction, Kind.GENERATOR),
    (inspect.isasyncgenfunction, Kind.ASYNC_GENERATOR),
)


def kind_of(function: Callable[..., Any]) -> Kind:
    """Return the kind of a function, method, partial or object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    for each in (function, getattr(type(function), "__call__", None)):  # noqa: B004  # the method itself is inspected
        for is_kind, kind in _TESTS:
            if is_kind(each):
                return kind
    return Kind.RESULT
