"""The retry policy: which errors a loader waits out, for how long, and what it logs.

A one-off command waits, up to its patience, for errors that resolve by themselves. The daemon waits forever,
also for errors that need a person. Waits are random below a bound that doubles, so that loaders do not retry
in step.
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
"""Seconds between two attempts after a conflict with another loader."""
_TICK_SECONDS: Final = 0.2
_QUIET_CONFLICTS: Final = 5
"""Number of conflicts with other loaders before they are logged."""
_TEMPORARY: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO}
)
"""Errors of writing rejects that may resolve by themselves."""

Failure = psycopg.Error | OSError | LoaderError
"""Errors that an attempt to connect or load may raise."""

P = ParamSpec("P")
T = TypeVar("T")


class RetryPolicy:
    """Repeats a call until it succeeds, waiting is pointless, `patience` is over, or `stop` is set.

    `patience` is in seconds since the last success of any worker, because workers take a failing batch in turns;
    without it, waits forever.
    """

    def __init__(self, signals: Signals, health: Health, patience: float | None) -> None:
        self._signals = signals
        self._health = health
        self._forever = patience is None
        self._patience = patience
        self._failing_since: float | None = None
        self._refusals = 0
        """Consecutive runs in which every row was refused."""
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_worth_waiting),
            wait=_wait,
            stop=self._is_over,
            sleep=self._sleep,
            before_sleep=self._report,
            reraise=True,
        )

    def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` and return its result. Raises the error of its last attempt."""
        return self._retrying(work, *args, **kwargs)

    def refused(self, error: psycopg.Error | LoaderError) -> None:
        """Report that all rows are refused, and wait before they are tried again.

        Raises the error if waiting is pointless.
        """
        if not self._forever:
            raise explain(error)
        self._log(explain(error))
        self._refusals += 1
        self._sleep(random.uniform(0, min(_FIRST_WAIT * 2**self._refusals, _LONGEST_WAIT)))

    def recovered(self) -> None:
        """Log the end of a wait, if there was one."""
        self._refusals = 0
        self._failing_since = None
        if self._health.recovered():
            log.info("loading continues")

    def _is_over(self, _: tenacity.RetryCallState) -> bool:
        """Whether to stop: asked to, or out of patience."""
        if self._signals.stop.is_set():
            return True
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        return self._patience is not None and now - self._failing_since >= self._patience

    def _is_worth_waiting(self, error: BaseException) -> bool:
        if isinstance(error, CannotWriteError):
            return False  # the batch is set aside, so that the others continue
        if self._forever:
            return isinstance(error, Failure)
        if isinstance(error, psycopg.Error):
            return is_temporary(error)
        return isinstance(error, OSError) and error.errno in _TEMPORARY

    def _report(self, state: tenacity.RetryCallState) -> None:
        """Log once why loading waits."""
        error = state.outcome and state.outcome.exception()
        if not isinstance(error, Failure) or _is_conflict(error, state.attempt_number):
            return
        self._log(explain(error))

    def _log(self, reason: LoaderError) -> None:
        # The message of an outage may change with each attempt, although it is the same outage.
        is_outage = isinstance(reason, OutOfReachError) and not isinstance(reason, LoginRefusedError)
        cause = str(reason).partition(":")[0] if is_outage else str(reason)
        if self._health.retrying(str(reason), cause):
            log.warning("%s; retrying with backoff, at most %g s apart", reason, _LONGEST_WAIT)

    def _sleep(self, seconds: float) -> None:
        """Wait between two attempts, until a stop, a reload, or the recovery of another worker."""
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
    """Whether this is only a conflict between loaders, which one or two further attempts resolve."""
    return (
        isinstance(error, psycopg.Error)
        and (error.sqlstate or "").startswith("40")
        and attempt < _QUIET_CONFLICTS
    )
