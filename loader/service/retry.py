"""The retry policy: what a loader waits for, how long, and what it logs meanwhile.

A command that ends by itself waits for what recovers without help, up to its patience. The daemon waits for
everything, also for what takes a person, forever. Waits are random below a bound that doubles, so that
loaders do not come back in step.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import psycopg
import tenacity

from loader.errors import LoaderError, OutOfReachError
from loader.files.rejects import CannotWriteError
from loader.load import sqlstate
from loader.load.sqlstate import explain
from loader.service.health import Health
from loader.service.signals import Signals

log = logging.getLogger("loader")

_FIRST_WAIT: Final = 0.2
_LONGEST_WAIT: Final = 30.0
"""Seconds between two attempts."""
_TICK_SECONDS: Final = 0.2
_QUIET_CONFLICTS: Final = 5
"""Attempts in which loaders may get into each other's way before that is logged."""
_TEMPORARY: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO}
)
"""Errors of writing rejects that may go away by themselves."""

Failure = psycopg.Error | OSError | LoaderError
"""What an attempt to connect or load may raise."""

P = ParamSpec("P")
T = TypeVar("T")


class RetryPolicy:
    """Repeats a call until it succeeds, waiting is pointless, `patience` seconds are over, or `stop` is set.

    Without `patience` it waits forever.
    """

    def __init__(self, signals: Signals, health: Health, patience: float | None) -> None:
        self._signals = signals
        self._health = health
        self._forever = patience is None
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_worth_waiting),
            wait=tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
            stop=tenacity.stop_any(
                tenacity.stop_when_event_set(signals.stop),
                tenacity.stop_never if patience is None else tenacity.stop_after_delay(patience),
            ),
            sleep=self._sleep,
            before_sleep=self._report,
            reraise=True,
        )

    def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what `work` returns. Raises what its last attempt raised."""
        return self._retrying(work, *args, **kwargs)

    def recovered(self) -> None:
        """Log the end of a wait, if there was one."""
        if self._health.recovered():
            log.info("loading goes on")

    def _is_worth_waiting(self, error: BaseException) -> bool:
        if isinstance(error, CannotWriteError):
            return False  # the batch is set aside, so that the others go on
        if self._forever:
            return isinstance(error, Failure)
        if isinstance(error, psycopg.Error):
            return sqlstate.action(error.sqlstate) is sqlstate.Action.RETRY
        return isinstance(error, OSError) and error.errno in _TEMPORARY

    def _report(self, state: tenacity.RetryCallState) -> None:
        """Log once that loading waits, and why."""
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, Failure) or _is_conflict(error, state.attempt_number):
            return
        reason = explain(error)
        # The message of an outage changes from attempt to attempt; that it is an outage does not.
        cause = str(reason).partition(":")[0] if isinstance(reason, OutOfReachError) else str(reason)
        if self._health.retrying(str(reason), cause):
            log.warning("%s; retrying with backoff, at most %g s apart", reason, _LONGEST_WAIT)

    def _sleep(self, seconds: float) -> None:
        """Wait between two attempts, unless asked to stop or to reload."""
        until, reloads = time.monotonic() + seconds, self._signals.reloads
        while (left := until - time.monotonic()) > 0 and self._signals.reloads == reloads:
            self._health.progressed()
            if self._signals.stop.wait(min(left, _TICK_SECONDS)):
                return


def _is_conflict(error: Exception, attempt: int) -> bool:
    """Whether loaders only got into each other's way, which the next attempt or two settle."""
    return (
        isinstance(error, psycopg.Error)
        and (error.sqlstate or "").startswith("40")
        and attempt < _QUIET_CONFLICTS
    )
