"""Forked children of an emitting process: no line is lost, ids are distinct, the parent keeps its segment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from spool import Emitter
from tests.emit.lines import emit, ids, lines, recover_all
from tests.processes import eventually


def test_64_forked_children_emit_at_once_while_their_parent_does(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    own = [emit(emitter)]
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            own.append(emit(emitter))
            time.sleep(0)  # lets the forking thread run

    thread = threading.Thread(target=work)
    thread.start()
    start_r, start_w = os.pipe()
    children = []
    for _ in range(64):
        if (child := os.fork()) == 0:
            os.close(start_w)
            os.read(start_r, 1)  # until the parent closes its end
            kept = [emit(emitter, n=n) for n in range(2000)]
            emitter.close()
            os._exit(None in kept)
        children.append(child)
    os.close(start_r)
    os.close(start_w)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    ended.set()
    thread.join()
    emitter.close()
    found = ids(tmp_path)
    assert len(found) == len(set(found)) == len(own) + 64 * 2000
    assert set(filter(None, own)) <= set(found)
    pids = {file.stem.rsplit("-", 3)[1] for file in tmp_path.glob("*.ndjson")}
    assert pids == {str(pid) for pid in (os.getpid(), *children)}


def test_a_forked_child_leaves_the_parents_segment_alone(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=60)
    emit(emitter)
    eventually(lambda: len(list(tmp_path.glob("*.open"))) == 2)  # the segment and its spare
    before = sorted(tmp_path.iterdir())
    if (child := os.fork()) == 0:
        emitter.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(tmp_path.iterdir()) == before
    kept = [emit(emitter) for _ in range(10)]
    emitter.close()
    assert len(ids(tmp_path)) == 1 + len(kept)


def test_a_child_that_lives_on_does_not_keep_its_dead_parents_segment_locked(tmp_path: Path) -> None:
    code = """
import os, sys, uuid
from spool import Emitter
emitter = Emitter(sys.argv[1], max_age=60)
user = uuid.uuid4()
emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user)
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.read()  # lives as long as the pipe
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"forked\n"  # so the child has released the inherited segment
    parent.wait()
    recover_all(tmp_path)
    assert len(lines(tmp_path)) == 1
    parent.communicate()


_forked: Emitter


def task(number: int) -> str | None:
    return emit(_forked, number=number)


def test_a_prefork_pool_as_celery_has_it(tmp_path: Path) -> None:
    global _forked
    _forked = Emitter(tmp_path, max_age=0.05)
    own = emit(_forked)
    with multiprocessing.get_context("fork").Pool(8, maxtasksperchild=100) as pool:
        kept = pool.map(task, range(4000), chunksize=25)
        pool.close()
        pool.join()
    _forked.close()
    recover_all(tmp_path)  # of children that were killed before they could seal
    assert sorted(ids(tmp_path)) == sorted(filter(None, [own, *kept]))


APPLICATION = """
import os, uuid
from spool import get_emitter
user = uuid.uuid4()
get_emitter().emit_event(event_type="loaded", user_id=user, family_unit_id=user)
def application(environ, start_response):
    made = get_emitter().emit_event(event_type="request", user_id=user, family_unit_id=user)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{made} {os.getpid()}".encode()]
"""


@pytest.mark.parametrize("worker", ["sync", "gevent"])
def test_gunicorn_with_a_preloaded_application(tmp_path: Path, worker: str) -> None:
    pytest.importorskip("gunicorn")
    pytest.importorskip("gevent")
    spool, port_file = tmp_path / "spool", tmp_path / "port"
    (tmp_path / "application.py").write_text(APPLICATION)
    (tmp_path / "settings.py").write_text(
        f"def when_ready(server):\n"
        f"    open({str(port_file)!r}, 'w').write(str(server.LISTENERS[0].getsockname()[1]) + '.')\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "--preload", "-k", worker, "-w", "4", "-c", "settings.py",
         "-b", "127.0.0.1:0", "--no-control-socket", "application:application"],
        cwd=tmp_path, env=os.environ | {"SPOOL_DIR": str(spool)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        port = eventually(lambda: port_file.read_text() if port_file.exists() else "")
        address = f"http://127.0.0.1:{port.rstrip('.')}/"
        answers = [urllib.request.urlopen(address, timeout=10).read().decode().split() for _ in range(400)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    recover_all(spool)
    found = {line["event_id"]: line["event_type"] for line in lines(spool)}
    assert {made for made, _ in answers} == {made for made, kind in found.items() if kind == "request"}
    assert list(found.values()).count("loaded") == 1


def test_32_idle_workers_reserve_64_kib_each(tmp_path: Path) -> None:
    segment = 1 << 20
    emitter = Emitter(tmp_path, segment_bytes=segment, max_age=0.2)
    end_r, end_w = os.pipe()
    children = []
    for _ in range(32):
        if (child := os.fork()) == 0:
            os.close(end_w)
            emit(emitter)
            os.read(end_r, 1)
            os._exit(0)
        children.append(child)
    os.close(end_r)
    try:
        eventually(lambda: len(lines(tmp_path)) == 32)
        eventually(lambda: [file.stat().st_size for file in tmp_path.glob("*.open")] == [1 << 16] * 32)
        for file in tmp_path.glob("*.open"):
            file.unlink()
        used = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
        assert used <= 32 * 8192
    finally:
        os.close(end_w)
        for child in children:
            os.waitpid(child, 0)
