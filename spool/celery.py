"""A scope for each Celery task, which starts with the context of the code that sent the task.

    import spool.celery           # in the module of the Celery application, for senders and workers

Or, without an import, in Celery's settings: `imports = ["spool.celery"]`, which only workers read. The
context is carried in a message header, as trace context is. A task that is retried, or sent by another task,
carries the context of the task that sends it. Nothing bound in a task outlives the task.

A pool process exits without running Python's exit handlers, so its emitter is closed when Celery signals that
the process is about to exit.
"""

from __future__ import annotations

from typing import Any, Final

from celery import signals

from spool.context import arrived, begin, begin_empty, carried, end, in_force
from spool.emitter import close_at_end

HEADER: Final = "analytics_spool"
_BEGUN: Final = "_analytics_spool_begun"


def connect() -> None:
    """Connect to Celery's signals; importing this module does so. Safe to repeat."""
    signals.before_task_publish.connect(_send, dispatch_uid="analytics_spool_send", weak=False)
    signals.task_prerun.connect(_begin, dispatch_uid="analytics_spool_begin", weak=False)
    signals.task_postrun.connect(_end, dispatch_uid="analytics_spool_end", weak=False)
    signals.worker_process_shutdown.connect(_close, dispatch_uid="analytics_spool_close", weak=False)


def _send(headers: dict[str, Any] | None = None, **_: object) -> None:
    """Put the current context into the message, replacing that of a retried task."""
    if headers is not None:
        headers[HEADER] = carried()


def _begin(task: Any, **_: object) -> None:
    """Open the task's scope. An eager task, which has no message, starts with its caller's context."""
    request = task.request
    if request.is_eager and in_force() is not None:
        begun = begin()
    else:
        begun = begin_empty(**arrived(getattr(request, HEADER, None)))
    setattr(request, _BEGUN, begun)


def _end(task: Any, **_: object) -> None:
    begun = task.request.__dict__.pop(_BEGUN, None)
    if begun is not None:
        end(begun)


def _close(**_: object) -> None:
    close_at_end()


connect()
