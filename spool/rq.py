"""A scope for each RQ job, which starts with the context of the code that enqueued the job.

    Queue(connection=redis, job_class="spool.rq.Job")       # in the process that enqueues
    rq worker --job-class spool.rq.Job                      # in the worker

Django-RQ: `RQ = {"JOB_CLASS": "spool.rq.Job"}`. The context is carried in the job's `meta`, which a retried
or repeated job keeps. Nothing bound in a job outlives the job.

RQ forks a process for each job and ends it with `os._exit`, which skips all exit handlers. So drops are
reported, and the emitted lines are sealed, after the job and after each of its callbacks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import rq.job

from spool.context import arrived, carried, scope
from spool.emitter import close_all

META: Final = "analytics_spool"
_LOADED_IN: Final = os.getpid()


@contextmanager
def _work(meta: dict[Any, Any]) -> Iterator[None]:
    """Run a part of a job in a scope of its own, and leave nothing open in a process that was forked for it."""
    try:
        with scope(**arrived(meta.get(META))):
            yield
    finally:
        if os.getpid() != _LOADED_IN:
            close_all()


class Job(rq.job.Job):
    """A job that carries the context of its enqueuer and runs, with its callbacks, in a scope of its own."""

    @classmethod
    def create(cls, *args: Any, **kwargs: Any) -> Job:
        """See `rq.job.Job.create`."""
        job = cast(Job, super().create(*args, **kwargs))
        if bound := carried():
            job.meta = {**job.meta, META: bound}
        return job

    def perform(self) -> Any:
        """See `rq.job.Job.perform`."""
        with _work(self.meta):
            return super().perform()

    @property
    def success_callback(self) -> Callable[..., Any] | None:
        """See `rq.job.Job.success_callback`."""
        return self._in_scope(super().success_callback)

    @property
    def failure_callback(self) -> Callable[..., Any] | None:
        """See `rq.job.Job.failure_callback`."""
        return self._in_scope(super().failure_callback)

    @property
    def stopped_callback(self) -> Callable[..., Any] | None:
        """See `rq.job.Job.stopped_callback`."""
        return self._in_scope(super().stopped_callback)

    def _in_scope(self, callback: Callable[..., Any] | None) -> Callable[..., Any] | None:
        if callback is None:
            return None
        # Used as a decorator, a `contextmanager` object starts afresh at each call.
        return _work(self.meta)(callback)
