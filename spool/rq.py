"""A scope for each RQ job, which begins with what was bound where the job was enqueued.

    Queue(connection=redis, job_class="spool.rq.Job")       # whoever enqueues
    rq worker --job-class spool.rq.Job                      # whoever works

Django-RQ: `RQ = {"JOB_CLASS": "spool.rq.Job"}`. What was bound travels in the job's `meta`, which a retried or
repeated job keeps. Nothing that a job binds outlives it.

RQ forks a process for each job and ends it by `os._exit`, which runs none of what a process does at its end. So
drops are reported, and what was emitted is sealed, after the job and after each of its callbacks.
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
    """Run a part of a job: in a scope of its own, and leaving nothing open in a process that was forked for it."""
    try:
        with scope(**arrived(meta.get(META))):
            yield
    finally:
        if os.getpid() != _LOADED_IN:
            close_all()


class Job(rq.job.Job):
    """A job that carries what was bound, and runs, with its callbacks, in a scope of its own."""

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
        # `contextmanager` objects are decorators that begin again at each call.
        return _work(self.meta)(callback)
