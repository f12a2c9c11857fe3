"""Detects foreign exceptions in an emit: raised by a signal handler, or set by another thread.

Celery's soft time limit, RQ's job timeout and the like raise in the main thread between any two instructions.
An emit that swallowed such an exception would let the job continue. The check runs only once an exception was
raised, so the hot path pays nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, TracebackType
from typing import Final

_OURS: Final = str(Path(__file__).parent)
_CALLED: Final = (_OURS, str(Path(os.__file__).parent), "<frozen ", "<string>")
"""Locations of the code of an emit: this package and the standard library, including frozen and generated code."""
_KNOWN: Final = ("builtins", "orjson")
"""Modules of the exceptions that this package raises or that occur in it."""


def is_foreign(error: BaseException) -> bool:
    """Whether the exception belongs to the application, so that it must be re-raised, not counted."""
    frames = list(_codes(error.__traceback__))
    if not frames:
        return False
    if len(frames) > 1:
        handlers = {code for number in signal.valid_signals() if (code := _handler_code(number)) is not None}
        if not handlers.isdisjoint(frames):
            return True
    # PyThreadState_SetAsyncExc: raised in a frame in which nothing else raises this type. Application code,
    # such as a method of an emitted value, may raise any.
    place, module = frames[-1].co_filename, type(error).__module__
    is_called = place.startswith(_CALLED) and (place.startswith(_OURS) or "site-packages" not in place)
    return is_called and not module.startswith(("spool", *_KNOWN))


def _codes(trace: TracebackType | None) -> Iterator[CodeType]:
    while trace is not None:
        yield trace.tb_frame.f_code
        trace = trace.tb_next


def _handler_code(number: int) -> CodeType | None:
    """Return the code that a signal runs, or None if it is not a Python function."""
    try:
        handler: object = signal.getsignal(number)
    except ValueError:
        return None
    while hasattr(handler, "func"):  # functools.partial
        handler = handler.func
    if isinstance(handler, MethodType):
        handler = handler.__func__
    elif not isinstance(handler, FunctionType) and callable(handler):
        handler = type(handler).__dict__.get("__call__")
    return handler.__code__ if isinstance(handler, FunctionType) else None
