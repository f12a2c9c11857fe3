"""Threads, tasks, greenlets, handlers and finalizers emit concurrently without a deadlock or a torn or lost line."""

from __future__ import annotations

import _thread
import asyncio
import faulthandler
import gc
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import spool
from spool import AnalyticsService, Emitter
from tests.emit.lines import emit, ids, interrupted, lines

TRIES = 10_000
ROOMS = tuple(str(path) for path in Path(spool.__file__).parent.glob("*.py"))


@pytest.fixture(autouse=True)
def no_deadlock() -> Iterator[None]:
    """Abort the run with a stack trace if a test hangs."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def numbers_have_no_gaps(directory: Path) -> None:
    writers: dict[str, list[int]] = {}
    for file in directory.glob("*.ndjson"):
        writer, number = file.stem.split("-", 1)[1].rsplit("-", 1)
        writers.setdefault(writer, []).append(int(number))
    for numbers in writers.values():
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_32_threads(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, segment_bytes=8192, max_age=0.01)
    kept: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: kept.extend([emit(emitter, n=n) for n in range(TRIES // 32 + 1)]))
        for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emitter.close()
    assert len(kept) >= TRIES and sorted(ids(tmp_path)) == sorted(filter(None, kept))
    assert emitter.stats().emitted == len(kept)
    numbers_have_no_gaps(tmp_path)


def test_asyncio_tasks(tmp_path: Path) -> None:
    service = AnalyticsService(Emitter(tmp_path, segment_bytes=8192, max_age=0.01))

    async def work() -> list[str | None]:
        kept = []
        for n in range(TRIES // 100):
            kept.append(await service.increment_counter(metric_name="tries", labels={"n": n}))
            await asyncio.sleep(0)
        return kept

    async def main() -> list[list[str | None]]:
        return await asyncio.gather(*(work() for _ in range(100)))

    kept = [each for task in asyncio.run(main()) for each in task]
    service.emitter.close()
    assert len(kept) == TRIES and sorted(ids(tmp_path)) == sorted(filter(None, kept))


def test_a_signal_handler_that_interrupts_emits(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, segment_bytes=16384)
    own = []
    with interrupted(emitter, seconds=0.00005, handler=True) as kept:
        while len(kept) < TRIES:
            own.append(emit(emitter, handler=False))
    emitter.close()
    assert sorted(ids(tmp_path)) == sorted(filter(None, [*own, *kept]))
    assert None not in own and None not in kept
    numbers_have_no_gaps(tmp_path)


def interrupt_at(wanted: int, interrupt: Callable[[], None]) -> Callable[[FrameType, str, Any], Any]:
    """Return a trace function that calls `interrupt` before the given instruction of our own code."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in ROOMS:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == wanted:
                sys.settrace(None)
                interrupt()
                sys.settrace(trace)
        return trace

    return trace


@pytest.fixture(params=["with housekeeping", "without"])
def housekeeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with and without a housekeeping thread; without it the emitting thread creates the segments."""
    if request.param == "without":

        def refuse(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(_thread, "start_new_thread", refuse)
    return str(request.param)


TRACED = pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="CPython 3.12.1 and 3.13.0 leave out events of instructions, or crash"
)
LONG = "x" * 3000
"""Of a segment of 4096 bytes: each emit rotates."""


@TRACED
def test_an_emit_at_every_instruction_of_an_emit_that_rotates(tmp_path: Path, housekeeping: str) -> None:
    """A handler or finalizer runs before each instruction in turn, by the interpreter's own tracing."""
    emitter = Emitter(tmp_path, segment_bytes=4096, max_age=60)
    own: list[str | None] = []
    kept: list[str | None] = []
    for wanted in itertools.count(1):
        before = len(kept)
        sys.settrace(interrupt_at(wanted, lambda: kept.append(emit(emitter, text=LONG))))
        try:
            own.append(emit(emitter, text=LONG))
        finally:
            sys.settrace(None)
        if len(kept) == before:
            break  # an emit that rotates has no such instruction
    emitter.close()
    assert None not in kept and None not in own
    assert sorted(ids(tmp_path)) == sorted(filter(None, [*own, *kept]))
    numbers_have_no_gaps(tmp_path)
    alone = [file for file in tmp_path.iterdir() if file.stem.endswith("-000001")]
    assert len(alone) > 50, "hardly any was interrupted in the middle of a rotation"


class Timeout(Exception):
    """An exception raised by a worker's signal handler."""


@TRACED
# Without a map it takes half a minute, and the process that ran it died three times, unexplained, under load.
@pytest.mark.parametrize("mapped", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_exception_before_every_instruction_of_an_emit_that_rotates(
    tmp_path: Path, housekeeping: str, mapped: bool
) -> None:
    """No lock stays held, every line of a returned emit exists, and every segment is sealed."""
    emitter = Emitter(tmp_path, segment_bytes=4096, max_age=60, mapped=mapped)
    kept: list[str | None] = []

    def interrupt(*_: object) -> None:
        raise Timeout

    previous = signal.signal(signal.SIGALRM, interrupt)  # distinguishes it from an exception of our own
    try:
        for wanted in itertools.count(1):
            sys.settrace(interrupt_at(wanted, interrupt))
            try:
                kept.append(emit(emitter, text=LONG))
            except Timeout:
                sys.settrace(None)
                kept.append(emit(emitter, text=LONG))
                kept.append(emits_in_another_thread(emitter))
            else:
                sys.settrace(None)
                break
            finally:
                sys.settrace(None)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert wanted > 500
    emitter.close()
    assert None not in kept and emitter.stats().dropped == {}
    found = ids(tmp_path)
    assert len(found) == len(set(found)) and set(filter(None, kept)) <= set(found)
    assert {file.suffix for file in tmp_path.iterdir()} == {".ndjson"}
    numbers_have_no_gaps(tmp_path)


def emits_in_another_thread(emitter: Emitter) -> str | None:
    """Emit in another thread, which would wait forever for a lock that stayed held."""
    kept: list[str | None] = []
    thread = threading.Thread(target=lambda: kept.append(emit(emitter)), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert kept, "another thread hangs"
    return kept[0]


class Finalized:
    """Emits in its finalizer; part of a cycle, so that only the garbage collector frees it."""

    def __init__(self, emitter: Emitter, kept: list[str | None]) -> None:
        self.emitter, self.kept, self.cycle = emitter, kept, self

    def __del__(self) -> None:
        self.kept.append(emit(self.emitter, finalizer=True))


def test_a_finalizer_that_the_collector_runs_inside_an_emit(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, segment_bytes=16384)
    kept: list[str | None] = []
    own = []
    thresholds = gc.get_threshold()
    gc.set_threshold(3)
    try:
        for _ in range(TRIES):
            Finalized(emitter, kept)
            own.append(emit(emitter, payload=[[], {}, []]))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    emitter.close()
    assert len(kept) == TRIES
    assert sorted(ids(tmp_path)) == sorted(filter(None, [*own, *kept]))
    assert len(own) + len(kept) == len(lines(tmp_path))


GREENLETS = """
import sys
{imports}
import uuid
user = uuid.uuid4()
emitter = Emitter(sys.argv[1], segment_bytes=8192, max_age=0.01)
kept = []
def work():
    for n in range(100):
        kept.append(emitter.emit_event(
            event_type="tick", user_id=user, family_unit_id=user, metadata={{"n": n}}))
        gevent.sleep(0)
gevent.joinall([gevent.spawn(work) for _ in range(100)], raise_error=True)
for n in range(1000):  # without ever yielding
    kept.append(emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user))
emitter.close()
print(*kept)
"""
PATCHED_FIRST = "import gevent.monkey; gevent.monkey.patch_all(); import gevent; from spool import Emitter"
PATCHED_LAST = "from spool import Emitter; import gevent.monkey; gevent.monkey.patch_all(); import gevent"


@pytest.mark.parametrize("imports", [PATCHED_FIRST, PATCHED_LAST], ids=["patched first", "patched last"])
def test_gevent_with_everything_patched(tmp_path: Path, imports: str) -> None:
    pytest.importorskip("gevent")
    code = GREENLETS.format(imports=imports)
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    kept = child.stdout.split()
    assert child.returncode == 0 and len(kept) == 11_000, child.stderr
    assert sorted(ids(tmp_path)) == sorted(kept)
