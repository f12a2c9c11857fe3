"""A scope for each Celery task, which begins with what was bound where the task was sent.

    import spool.celery           # in the module of the Celery application, for who sends and who works

Or, without an import, in Celery's settings: `imports = ["spool.celery"]`, which only workers read. What was
bound travels in a header of the message, as trace context does. A task that is retried, or sent by another
task, carries what is bound in the task that sends it. Nothing that a task binds outlives it.

A process of a worker's pool ends without what Python does at the end of a process, so its emitter is closed
when Celery signals that it is about to end.
"""

from __future__ import annotations

from typing import Any, Final

from celery import signals

from spool.context import arrived, begin, begin_empty, carried, end, in_force
from spool.emitter import close_at_end

HEADER: Final = "analytics_spool"
_BEGUN: Final = "_analytics_spool_begun"


def connect() -> None:
    """Connect to Celery's signals, as importing this module does. Safe to repeat."""
    signals.before_task_publish.connect(_send, dispatch_uid="analytics_spool_send", weak=False)
    signals.task_prerun.connect(_begin, dispatch_uid="analytics_spool_begin", weak=False)
    signals.task_postrun.connect(_end, dispatch_uid="analytics_spool_end", weak=False)
    signals.worker_process_shutdown.connect(_close, dispatch_uid="analytics_spool_close", weak=False)


def _send(headers: dict[str, Any] | None = None, **_: object) -> None:
    """Put what is bound into the message, in place of what the message of a retried task had."""
    if headers is not None:
        headers[HEADER] = carried()


def _begin(task: Any, **_: object) -> None:
    """Open the task's scope. An eager task, which no message carried, begins with what its caller bound."""
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
