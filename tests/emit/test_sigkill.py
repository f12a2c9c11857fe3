"""An emit that returned survives SIGKILL at any later instant, and a partial line is never loaded.

The child acknowledges each emit by incrementing a number in shared memory, which survives a kill. Event ids
are derived from that number, so the acknowledged events are known without another channel.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from loader.load.decode import Row, decode
from spool import Emitter
from tests.emit.lines import FAMILY, USER, recover_all
from tests.processes import eventually

MEMORY = Path("/dev/shm")


def event_id(thread: int, number: int) -> str:
    return str(UUID(int=thread << 64 | number))


def emit_for_ever(spool: Path, threads: int, acknowledged: mmap.mmap) -> None:
    """Emit and acknowledge in several threads until the process is killed."""
    emitter = Emitter(spool, segment_bytes=32768, max_age=0.02)

    def work(thread: int) -> None:
        number = 0
        while True:
            number += 1
            text = "x" * (number * 7919 % 1500)
            emitter.emit_event(
                event_type="tick", user_id=USER, family_unit_id=FAMILY, metadata={"text": text},
                event_id=event_id(thread, number),
            )  # fmt: skip
            struct.pack_into("Q", acknowledged, thread * 8, number)

    for thread in range(1, threads):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    work(0)


def kill_at(spool: Path, threads: int, moment: int) -> list[int]:
    """Kill a child once its first thread has acknowledged `moment` emits; return what each acknowledged."""
    with mmap.mmap(-1, 8 * threads) as acknowledged:
        if (child := os.fork()) == 0:
            try:
                emit_for_ever(spool, threads, acknowledged)
            finally:
                os._exit(1)
        try:
            eventually(lambda: struct.unpack_from("Q", acknowledged)[0] >= moment)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        return list(struct.unpack(f"{threads}Q", acknowledged))


def rows(spool: Path) -> list[str]:
    """Return the ids of all lines, each of which must be loadable."""
    found = []
    for file in spool.glob("*.ndjson"):
        for line in file.read_bytes().splitlines():
            row = decode(line)
            assert isinstance(row, Row), row
            found.append(row.event_id)
    return found


@contextmanager
def a_spool(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


def survive(parent: Path, threads: int, kills: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    for _ in range(kills):
        with a_spool(parent) as spool:
            acknowledged = kill_at(spool, threads, moments.randrange(1, 800))
            recover_all(spool)
            found = rows(spool)
            assert len(found) == len(set(found))
            kept = set(found)
            for thread, last in enumerate(acknowledged):
                missing = {event_id(thread, n) for n in range(1, last + 1)} - kept
                assert not missing


@pytest.mark.parametrize("threads", [1, 4])
def test_an_emit_that_returned_survives_sigkill(tmp_path: Path, threads: int) -> None:
    survive(tmp_path, threads, 25)


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("memory", [False, True], ids=["disk", "tmpfs"])
def test_an_emit_that_returned_survives_a_thousand_sigkills(
    tmp_path: Path, threads: int, memory: bool
) -> None:
    if memory and not MEMORY.is_dir():
        pytest.skip("there is no /dev/shm here")
    survive(MEMORY if memory else tmp_path, threads, 250)
