"""Signals to a running command: to stop, or to reload its settings."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


class Signals:
    """The received signals. SIGTERM, the first Ctrl-C and a closed terminal set `stop`; `reloads` counts SIGHUPs."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.reloads = 0


@contextlib.contextmanager
def until_signal() -> Iterator[Signals]:
    """Record received signals within the block; a second Ctrl-C ends the process immediately.

    SIGHUP means reload only under a service manager, recognized by NOTIFY_SOCKET (sd_notify(3)). Otherwise it
    means that the terminal was closed: stop. If it is ignored, as under nohup(1), it remains ignored.
    """
    signals = Signals()

    def stop(number: int, _: object) -> None:
        signals.stop.set()
        signal.signal(number, signal.SIG_DFL)

    def reload(_: int, __: object) -> None:
        signals.reloads += 1

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {
        signal.SIGTERM: stop,
        signal.SIGINT: stop,
    }
    if os.environ.get("NOTIFY_SOCKET"):
        handlers[signal.SIGHUP] = reload
    elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = stop
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def interrupted_by_hangup() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on SIGTERM and a closed terminal, so that cleanup code runs."""

    def interrupt(_: int, __: object) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
