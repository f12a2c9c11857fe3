"""The retry policy: what a loader waits for, how long, and what it logs.

A command that ends by itself waits for what recovers without help, up to its patience. The daemon waits for
everything, also for what takes a person, forever. Waits are random below a bound that doubles, so that
loaders do not come back in step.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import psycopg
import tenacity

from loader.errors import LoaderError, LoginRefusedError, OutOfReachError
from loader.files.rejects import CannotWriteError
from loader.load.sqlstate import explain, is_temporary
from loader.service.health import Health
from loader.service.signals import Signals

log = logging.getLogger("loader")

_FIRST_WAIT: Final = 0.2
_LONGEST_WAIT: Final = 30.0
"""Seconds between two attempts."""
_LONGEST_CONFLICT: Final = 1.0
"""Seconds between two attempts if loaders got into each other's way."""
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
        self._refusals = 0
        """Runs in a row in which everything was refused."""
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_worth_waiting),
            wait=_wait,
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

    def refused(self, error: psycopg.Error | LoaderError) -> None:
        """Report that rows are refused whatever they are, and wait before all are tried again.

        Raises the error if it is not waited for.
        """
        if not self._forever:
            raise explain(error)
        self._log(explain(error))
        self._refusals += 1
        self._sleep(random.uniform(0, min(_FIRST_WAIT * 2**self._refusals, _LONGEST_WAIT)))

    def recovered(self) -> None:
        """Log the end of a wait, if there was one."""
        self._refusals = 0
        if self._health.recovered():
            log.info("loading goes on")

    def _is_worth_waiting(self, error: BaseException) -> bool:
        if isinstance(error, CannotWriteError):
            return False  # the batch is set aside, so that the others go on
        if self._forever:
            return isinstance(error, Failure)
        if isinstance(error, psycopg.Error):
            return is_temporary(error)
        return isinstance(error, OSError) and error.errno in _TEMPORARY

    def _report(self, state: tenacity.RetryCallState) -> None:
        """Log once that loading waits, and why."""
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, Failure) or _is_conflict(error, state.attempt_number):
            return
        self._log(explain(error))

    def _log(self, reason: LoaderError) -> None:
        # The message of an outage changes from attempt to attempt; that it is an outage does not.
        is_outage = isinstance(reason, OutOfReachError) and not isinstance(reason, LoginRefusedError)
        cause = str(reason).partition(":")[0] if is_outage else str(reason)
        if self._health.retrying(str(reason), cause):
            log.warning("%s; retrying with backoff, at most %g s apart", reason, _LONGEST_WAIT)

    def _sleep(self, seconds: float) -> None:
        """Wait between two attempts, unless asked to stop or to reload, or another worker recovers."""
        until, reloads = time.monotonic() + seconds, self._signals.reloads
        waits = self._health.waits_for is not None
        while (left := until - time.monotonic()) > 0 and self._signals.reloads == reloads:
            self._health.progressed()
            if waits and self._health.waits_for is None:
                return
            if self._signals.stop.wait(min(left, _TICK_SECONDS)):
                return


_wait_for_recovery = tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_WAIT)
_wait_for_others = tenacity.wait_random_exponential(_FIRST_WAIT, max=_LONGEST_CONFLICT)


def _wait(state: tenacity.RetryCallState) -> float:
    """Return the seconds until the next attempt."""
    error = state.outcome and state.outcome.exception()
    conflict = isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith("40")
    return (_wait_for_others if conflict else _wait_for_recovery)(state)


def _is_conflict(error: Exception, attempt: int) -> bool:
    """Whether loaders only got into each other's way, which the next attempt or two settle."""
    return (
        isinstance(error, psycopg.Error)
        and (error.sqlstate or "").startswith("40")
        and attempt < _QUIET_CONFLICTS
    )
