"""Jobs carry their context through a real Redis to forking workers, whatever their order.

Jobs with and without users are interleaved; each binds a different user at its end, and some fail and are
retried. 20,000 jobs of each with `pytest -m long`; without it, 20 of RQ (test_jobs.py has Celery without
Redis).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from spool.context import scope
from spool.metrics import DROPPED_METRIC
from tests.emit.lines import lines, recover_all
from tests.processes import environment, eventually

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
LONG = 20_000
SECONDS_A_JOB = 0.5
WORKERS = 2

TASKS = """
from spool import get_emitter
from spool.context import update

def act(name, number):
    get_emitter().emit_event(event_type=name, metadata={"number": number})
    get_emitter().increment_counter(metric_name="lost", value="not a number")

def leave_somebody(number):
    update(user_id="00000000-0000-0000-0000-000000000001", extra={"left": "behind"})
    if number % 5 == 0:
        raise ValueError(number)
"""

RQ_TASKS = (
    TASKS
    + """
def work(number):
    act("worked", number)
    leave_somebody(number)

def called_back(job, *_):
    act("called_back", job.args[0])
"""
)

CELERY_TASKS = (
    TASKS
    + """
import os
from celery import Celery
import spool.celery

app = Celery("tasks", broker="redis+socket://" + os.environ["REDIS_SOCKET"])
app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False)

@app.task(bind=True, max_retries=1)
def work(self, number):
    if number % 7 == 0 and not self.request.retries:
        raise self.retry(countdown=0)
    act("worked", number)
    leave_somebody(number)
"""
)


def bound(number: int) -> dict[str, Any]:
    """Return the context in which a job is sent; every second job has no user."""
    if number % 2:
        return {}
    user = uuid.UUID(int=number + 2)
    return {
        "user_id": user,
        "family_unit_id": str(user),
        "request_id": f"r-{number}",
        "extra": {"plan": number},
    }


@pytest.fixture
def redis_socket() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="redis-", dir="/tmp") as home:  # a socket's path is short
        path = f"{home}/socket"
        command = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", home]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            eventually(Path(path).exists)
            yield path
        finally:
            server.terminate()
            server.wait()


@contextmanager
def workers(home: Path, tasks: str, socket: str, *command: str, count: int) -> Iterator[Path]:
    """Run workers for a module of tasks, and yield their spool."""
    (home / "tasks.py").write_text(tasks)
    variables = environment(
        SPOOL_DIR=str(home / "spool"), SPOOL_IDENTITY="optional", REDIS_SOCKET=socket,
        PYTHONPATH=os.pathsep.join([str(home), *sys.path]),
    )  # fmt: skip
    with ExitStack() as until:
        for _ in range(count):
            worker = subprocess.Popen([sys.executable, "-m", *command], cwd=home, env=variables)
            until.callback(worker.wait, 60)
            until.callback(worker.terminate)
        yield home / "spool"


def check_drops(directory: Path, drops: int) -> None:
    """Check that every dropped line is reported, however its process ended."""
    reports = [line for line in lines(directory) if line.get("metric_name") == DROPPED_METRIC]
    assert {line["labels"]["name"] for line in reports} == {"lost"}
    assert sum(line["value"] for line in reports) == drops


def check(directory: Path, name: str, jobs: int) -> None:
    """Check that every job emitted once, with the user bound when it was sent."""
    events = [line for line in lines(directory) if line.get("event_type") == name]
    assert sorted(event["metadata"].pop("number") for event in events) == list(range(jobs))
    expected = {}
    for number in range(jobs):
        values = bound(number)
        user = str(values["user_id"]) if values else None
        expected[user] = {"request_id": values["request_id"], "plan": number} if values else {}
    wrong = [event for event in events if event["metadata"] != expected.get(event["user_id"])]
    assert wrong == []
    assert len({event["user_id"] for event in events}) == jobs // 2 + 1
    assert all(event["family_unit_id"] == event["user_id"] for event in events)


@needs_redis
@pytest.mark.parametrize("jobs", [20, pytest.param(LONG, marks=pytest.mark.long)])
def test_what_is_bound_travels_with_rq_jobs_to_workers_that_fork(
    tmp_path: Path, redis_socket: str, jobs: int
) -> None:
    rq = pytest.importorskip("rq")
    from redis import Redis

    command = ["rq.cli", "worker", "-u", f"unix://{redis_socket}", "--job-class", "spool.rq.Job"]
    with (
        Redis(unix_socket_path=redis_socket) as connection,
        workers(tmp_path, RQ_TASKS, redis_socket, *command, "--quiet", count=WORKERS) as directory,
    ):
        queue = rq.Queue(connection=connection, job_class="spool.rq.Job")
        callback = rq.Callback("tasks.called_back")
        for number in range(jobs):
            with scope(**bound(number)):
                queue.enqueue("tasks.work", number, on_success=callback, on_failure=callback, result_ttl=-1)
        finished = (queue.finished_job_registry, queue.failed_job_registry)
        eventually(lambda: sum(each.count for each in finished) == jobs, SECONDS_A_JOB * jobs + 60)
    recover_all(directory)
    check(directory, "worked", jobs)
    check(directory, "called_back", jobs)
    check_drops(directory, 2 * jobs)


@needs_redis
@pytest.mark.long
def test_what_is_bound_travels_with_celery_tasks_through_redis(tmp_path: Path, redis_socket: str) -> None:
    celery = pytest.importorskip("celery")
    from redis import Redis

    import_module("spool.celery")  # connects
    command = ["celery", "-A", "tasks", "worker", "-c", str(WORKERS), "-l", "CRITICAL", "--without-heartbeat"]
    with (
        Redis(unix_socket_path=redis_socket) as connection,
        celery.Celery("sender", broker=f"redis+socket://{redis_socket}") as sender,
        workers(tmp_path, CELERY_TASKS, redis_socket, *command, count=1) as directory,
    ):
        for number in range(LONG):
            with scope(**bound(number)):
                sender.send_task("tasks.work", args=[number])
        eventually(lambda: not connection.llen("celery"), SECONDS_A_JOB * LONG)
        eventually(lambda: len(lines(directory)) >= LONG)
    recover_all(directory)
    check(directory, "worked", LONG)
    check_drops(directory, LONG)
