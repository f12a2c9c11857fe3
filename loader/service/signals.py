"""What a person or systemd asks of a running command: to stop, or to look at its settings again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Signals:
    """`stop` is set by SIGTERM and the first Ctrl-C; `reloads` counts SIGHUPs."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.reloads = 0


@contextlib.contextmanager
def until_signal() -> Iterator[Signals]:
    """Note the signals that come; the second Ctrl-C ends the process at once."""
    signals = Signals()

    def stop(number: int, _: object) -> None:
        signals.stop.set()
        signal.signal(number, signal.SIG_DFL)

    def reload(_: int, __: object) -> None:
        signals.reloads += 1

    handlers: dict[signal.Signals, Callable[[int, object], None]] = {
        signal.SIGTERM: stop,
        signal.SIGINT: stop,
        signal.SIGHUP: reload,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield signals
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
