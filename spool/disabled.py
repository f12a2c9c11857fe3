"""A disabled emitter (`SPOOL_DISABLED=1`): it writes, counts, logs and creates nothing.

A test that records (spool/testing.py) enables it for the duration of its block, so an application's tests can
run with `SPOOL_DISABLED=1` and never write to a spool by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spool.emitter import Emitter, Stats
from spool.hook import install


class DisabledEmitter(Emitter):
    """An emitter that does nothing. `disable` replaces the class, so an enabled emitter has no check to pay for."""

    __slots__ = ()

    def emit_event(self, **_: Any) -> None:
        """Do nothing."""

    def _metric(self, *_: Any) -> None:
        pass

    def refuse(self, error: Exception, name: object = None) -> None:
        """Do nothing, also in strict mode."""

    def count_unbound(self) -> None:
        """Do nothing, also in strict mode."""

    def prepare(self) -> None:
        """Do nothing."""

    def seal(self) -> bool:
        """Return True: there is nothing to seal."""
        return True

    def stats(self) -> Stats:
        """Return zeros."""
        return Stats(0, {}, 0, 0)

    def close(self) -> None:
        """Do nothing."""

    def log_summary(self) -> None:
        """Do nothing."""

    @contextmanager
    def diverted(self, write: Callable[[bytes], int], *, strict: bool) -> Iterator[None]:
        """Enable the emitter until the block ends; see `Emitter.diverted`."""
        _become(self, Emitter)
        try:
            install(self, self._before_emit)
            with Emitter.diverted(self, write, strict=strict):
                yield
        finally:
            _become(self, DisabledEmitter)
            self._housekeeper.stop()


def disable(emitter: Emitter) -> None:
    """Disable an emitter."""
    _become(emitter, DisabledEmitter)


def _become(emitter: Emitter, kind: type[Emitter]) -> None:
    emitter.__class__ = kind
