"""The public calls from tasks of a Celery worker that forks its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.emit.lines import lines, recover_all
from tests.processes import environment, eventually

TASKS = """
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from spool import get_emitter
from spool.context import bind
from spool.events import emits, log_memory_posted

home = {home!r}
folders = {{"data_folder_in": home, "data_folder_out": home, "control_folder": home + "/control"}}
app = Celery("tasks", broker="filesystem://", broker_transport_options=folders)
get_emitter().increment_counter(metric_name="worker_loaded")  # before the worker forks

@app.task(soft_time_limit=1)
def hang(file):
    try:
        while True:
            get_emitter().increment_counter(metric_name="hanging", labels={{"a": {{"b": object()}}}})
    except SoftTimeLimitExceeded:
        open(file, "w").close()

@app.task
@emits("pet_created", pet_id="pet", user_id="user", family_unit_id="user")
def adopt(pet, user):
    with bind(user_id=user, family_unit_id=user, role="worker"):
        log_memory_posted.emit(memory_id=pet)
"""


def test_tasks_emit_as_any_code_does_and_a_soft_time_limit_reaches_them(tmp_path: Path) -> None:
    pytest.importorskip("celery")
    spool, home = tmp_path / "spool", tmp_path / "broker"
    (home / "control").mkdir(parents=True)
    (tmp_path / "tasks.py").write_text(TASKS.format(home=str(home)))
    variables = environment(SPOOL_DIR=str(spool), PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    command = ["-m", "celery", "-A", "tasks", "worker", "-c", "2", "-l", "ERROR", "--without-heartbeat"]
    worker = subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=variables)
    try:
        pets = [str(uuid.uuid4()) for _ in range(50)]
        send = "import sys, tasks; [tasks.adopt.delay(pet, sys.argv[1]) for pet in sys.argv[2:]]"
        user = str(uuid.uuid4())
        client = environment(SPOOL_DIR=str(tmp_path / "other"), PYTHONPATH=variables["PYTHONPATH"])
        subprocess.run([sys.executable, "-c", send, user, *pets], cwd=tmp_path, env=client, check=True)
        eventually(lambda: len(lines(spool)) >= 2 * len(pets))
        limited = [tmp_path / f"limited{number}" for number in range(2)]
        send = "import sys, tasks; [tasks.hang.delay(file) for file in sys.argv[1:]]"
        subprocess.run(
            [sys.executable, "-c", send, *map(str, limited)], cwd=tmp_path, env=client, check=True
        )  # fmt: skip
        eventually(lambda: all(file.exists() for file in limited), seconds=30)
    finally:
        worker.terminate()
        worker.wait(timeout=30)
    recover_all(spool)
    made = [line for line in lines(spool) if "event_type" in line]
    assert sorted(e["metadata"]["pet_id"] for e in made if e["event_type"] == "pet_created") == sorted(pets)
    posted = [event["metadata"] for event in made if event["event_type"] == "memory_posted"]
    assert sorted(metadata["memory_id"] for metadata in posted) == sorted(pets)
    assert {metadata["role"] for metadata in posted} == {"worker"} and {e["user_id"] for e in made} == {user}
    assert len({e["event_id"] for e in made}) == 100
