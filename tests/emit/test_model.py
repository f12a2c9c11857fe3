"""A model of the emitter: whatever happens to its process, disk and directory, in any order, the spool contains
exactly the events whose emit returned an id.

The emitter runs in a separate process, which executes commands and replies with the returned ids, so that it
can be killed between any two steps (tests/emit/test_sigkill.py kills in the middle of them). The disk is a
tmpfs where mounting one is allowed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from loader.files.scan import scan
from spool import Emitter
from spool.emitter import _emitters
from spool.metrics import DROPPED_METRIC
from spool.segment import recover
from tests import histories
from tests.emit.lines import emit, lines, recover_all
from tests.processes import eventually

MAX_AGE = 0.1
SEGMENT_BYTES = 8192
FORK = multiprocessing.get_context("fork")


def serve(spool: Path, orders: Connection) -> None:
    """Run the emitter's process: reply to each command with the ids of the written events, None for a drop."""
    emitter = Emitter(spool, max_age=MAX_AGE, segment_bytes=SEGMENT_BYTES)
    while True:
        order, *arguments = orders.recv()
        if order == "emit":
            orders.send([emit(emitter, text="x" * arguments[0]) for _ in range(arguments[1])])
        elif order == "fork":
            orders.send(emit_in_a_child(emitter, os.fork, *arguments))
        elif order == "fork in C":
            orders.send(emit_in_a_child(emitter, lambda: fork_in_c(emitter), *arguments))
        elif order == "seal":
            orders.send(emitter.seal())
        elif order == "close":
            emitter.close()
            orders.send(dict(emitter.stats().dropped))
            os._exit(0)


def fork_in_c(emitter: Emitter) -> int:
    """Fork without hooks, as uWSGI does, without a housekeeping thread that might want the GIL.

    A child of a process in which one does may hang, before any code of ours runs (spool/housekeeper.py). Other
    tests have left emitters with threads to this process.
    """
    for each in [emitter, *_emitters]:
        each._housekeeper.stop()
    if child := int(ctypes.PyDLL(None).fork()):
        emitter._housekeeper.wake()
    return child


def scan_for_ever(spool: Path) -> None:
    """Scan continuously, like a loader, and adopt the segments of dead writers."""
    while True:
        with suppress(FileNotFoundError):
            scan(spool)


def emit_in_a_child(emitter: Emitter, fork: Callable[[], int], count: int, close: bool) -> list[str | None]:
    ours, theirs = FORK.Pipe()
    if (child := fork()) == 0:
        theirs.send([emit(emitter) for _ in range(count)])
        if close:
            emitter.close()
        os._exit(0)
    kept: list[str | None] = ours.recv()
    os.waitpid(child, 0)
    return kept


class EmitterModel(RuleBasedStateMachine):
    disk: Path  # a separate file system, or just a directory
    small = False

    @initialize()
    def begin(self) -> None:
        self.home = Path(tempfile.mkdtemp(dir=self.disk))
        self.spool = self.home / "spool"
        self.filler = self.home / "filler"
        self.kept: list[str] = []
        self.loaded: list[str] = []
        self.sealed: dict[Path, bytes] = {}
        self.scanner = FORK.Process(target=scan_for_ever, args=(self.spool,), daemon=True)
        self.scanner.start()
        self.start()

    def start(self) -> None:
        self.orders, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(self.spool, theirs), daemon=False)
        self.process.start()

    def ask(self, *order: object) -> object:
        self.orders.send(order)
        assert self.orders.poll(30), f"no answer to {order}"
        return self.orders.recv()

    def keep(self, answers: object) -> None:
        assert isinstance(answers, list)
        assert self.filler.exists() or None not in answers, "dropped, though there is room"
        self.kept += filter(None, answers)

    @rule(size=st.sampled_from([0, 100, 3000, 9000]), count=st.integers(1, 30))
    def emit(self, size: int, count: int) -> None:
        self.keep(self.ask("emit", size, count))

    @rule(count=st.integers(1, 30), close=st.booleans())
    def fork(self, count: int, close: bool) -> None:
        self.keep(self.ask("fork", count, close))

    @rule(count=st.integers(1, 30), close=st.booleans())
    def fork_in_c(self, count: int, close: bool) -> None:
        self.keep(self.ask("fork in C", count, close))

    @rule()
    def seal(self) -> None:
        assert self.ask("seal") or self.filler.exists()

    @precondition(lambda self: not self.filler.exists())
    @rule()
    def age(self) -> None:
        """Wait until every line is in a sealed file, although nothing is emitted any more."""
        eventually(lambda: set(self.kept) <= set(self.loaded) | set(self.found()) or recover_dead(self))

    @rule()
    def kill(self) -> None:
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.start()

    @rule()
    def close_and_start_again(self) -> None:
        self.ask("close")
        self.process.join()
        self.start()

    @rule()
    def recover(self) -> None:
        recover_dead(self)

    @rule()
    def load(self) -> None:
        """Remove sealed files like the loader, and check that they did not change after they were sealed."""
        for file in self.spool.glob("*.ndjson"):
            data = file.read_bytes()
            assert data.endswith(b"\n") and b"\0" not in data
            assert self.sealed.get(file, data) == data
            self.loaded += ids_of(self.spool, file.name)
            file.unlink()

    @rule()
    def look(self) -> None:
        self.sealed |= {file: file.read_bytes() for file in self.spool.glob("*.ndjson")}

    @precondition(lambda self: self.small and not self.filler.exists())
    @rule()
    def fill_the_disk(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                while write(file.fileno(), size):
                    pass

    @precondition(lambda self: self.filler.exists())
    @rule()
    def make_space(self) -> None:
        self.filler.unlink()
        eventually(lambda: None not in self.emitted_once())

    def emitted_once(self) -> list[str | None]:
        answers = self.ask("emit", 0, 1)
        assert isinstance(answers, list)
        self.kept += filter(None, answers)
        return answers

    def found(self) -> list[str]:
        return ids_of(self.spool, "*.ndjson")

    def teardown(self) -> None:
        if not hasattr(self, "process"):
            return
        self.filler.unlink(missing_ok=True)
        self.process.kill()
        self.process.join()
        self.scanner.kill()
        self.scanner.join()
        recover_all(self.spool)
        assert sorted(self.loaded + self.found()) == sorted(self.kept)
        shutil.rmtree(self.home)


def recover_dead(model: EmitterModel) -> bool:
    """Seal the segments of dead writers like the loader; those of running writers are not touched."""
    for file in model.spool.glob("*.open"):
        try:
            recover(file)
        except FileNotFoundError:
            continue  # sealed by its writer in between
    return False


def ids_of(spool: Path, pattern: str) -> list[str]:
    found = lines(spool, pattern)
    return [line["event_id"] for line in found if line.get("metric_name") != DROPPED_METRIC]


def write(fd: int, size: int) -> bool:
    try:
        return os.write(fd, bytes(size)) == size
    except OSError:
        return False


@contextmanager
def a_disk(parent: Path) -> Iterator[tuple[Path, bool]]:
    """Yield a tmpfs of 4 MiB, or just a directory if mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(parent)]
    if subprocess.run(command, capture_output=True).returncode:
        yield parent, False
        return
    try:
        yield parent, True
    finally:
        subprocess.run(["umount", "-l", parent], check=True)


def check(parent: Path, examples: int) -> None:
    with a_disk(parent) as (disk, small):
        model = type("Model", (EmitterModel,), {"disk": disk, "small": small})
        histories.check(model, examples, steps=30)


def test_the_spool_holds_exactly_what_was_acknowledged(tmp_path: Path) -> None:
    check(tmp_path, 15)


@pytest.mark.long
def test_the_spool_holds_exactly_what_was_acknowledged_in_many_histories(tmp_path: Path) -> None:
    check(tmp_path, 400)
