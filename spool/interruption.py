"""Exceptions of somebody else that come out of an emit: from a signal handler, or set by another thread.

Celery's soft time limit, RQ's job timeout and the like raise in the main thread between any two instructions,
and an emit that swallowed them would let the job go on. Asked only once an exception is there, so that the
hot path pays nothing.
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
"""Where the code of an emit lies: this package and the standard library, with its frozen and generated code."""
_KNOWN: Final = ("builtins", "orjson")
"""Modules of the exceptions that the code of this package raises or that are raised in it."""


def is_foreign(error: BaseException) -> bool:
    """Whether the exception belongs to the application: it has to be raised again, not counted."""
    frames = list(_codes(error.__traceback__))
    if not frames:
        return False
    if len(frames) > 1:
        handlers = {code for number in signal.valid_signals() if (code := _handler_code(number)) is not None}
        if not handlers.isdisjoint(frames):
            return True
    # PyThreadState_SetAsyncExc: raised in a frame in which nothing raises this kind. Code of the application, of
    # a value that it gave, may raise any.
    place, module = frames[-1].co_filename, type(error).__module__
    is_called = place.startswith(_CALLED) and (place.startswith(_OURS) or "site-packages" not in place)
    return is_called and not module.startswith(("spool", *_KNOWN))


def _codes(trace: TracebackType | None) -> Iterator[CodeType]:
    while trace is not None:
        yield trace.tb_frame.f_code
        trace = trace.tb_next


def _handler_code(number: int) -> CodeType | None:
    """Return the code that a signal runs, None if that is not a Python function."""
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
