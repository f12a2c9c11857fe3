"""An emitter that is switched off (`SPOOL_DISABLED=1`): it keeps, counts, logs and creates nothing.

A test that records (spool/testing.py) switches it on until its block ends, so the tests of an application can
run with `SPOOL_DISABLED=1` and write nothing to a spool by accident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spool.emitter import Emitter, Stats
from spool.hook import install


class DisabledEmitter(Emitter):
    """Does nothing. An enabled one becomes a disabled one by its class, so neither pays for the other."""

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
        """Return True: nothing waits."""
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
        """Be enabled until the block ends; see `Emitter.diverted`."""
        _become(self, Emitter)
        try:
            install(self, self._before_emit)
            with Emitter.diverted(self, write, strict=strict):
                yield
        finally:
            _become(self, DisabledEmitter)
            self._housekeeper.stop()


def disable(emitter: Emitter) -> None:
    """Switch an emitter off."""
    _become(emitter, DisabledEmitter)


def _become(emitter: Emitter, kind: type[Emitter]) -> None:
    emitter.__class__ = kind
