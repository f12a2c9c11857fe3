"""Benchmark of the first emit: of a prepared process, of an unprepared one, and after a pause.

    python -m tests.bench.first_emit [--processes N] [--pauses N] [--seconds PAUSE]

Each is compared with a steady emit and with `os.write` of a ready record, alone and with 3 CPU-bound threads.
A first emit can be measured only once per process, so each sample is a separate process. Times in
microseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

from tests.bench.emit import BURNERS
from tests.bench.sinks import FAMILY, METADATA, SESSION, USER, floor

STEADY = 2000
GAP_SECONDS = 0.0005


@contextmanager
def busy(threads: int) -> Iterator[None]:
    stop = False

    def burn() -> None:
        number = 0
        while not stop:
            number += 1

    for _ in range(threads):
        threading.Thread(target=burn, daemon=True).start()
    try:
        yield
    finally:
        stop = True


def once(call: Callable[[], object]) -> float:
    begin = perf_counter_ns()
    call()
    return (perf_counter_ns() - begin) / 1000


def measure(directory: Path, kind: str, threads: int, pauses: int, seconds: float) -> list[float]:
    """Return the samples of one process; `kind` is prepared, unprepared, pause, steady or write."""
    from spool import Emitter

    emitter = Emitter(directory / "spool", max_age=min(1.0, seconds))

    def emit() -> object:
        return emitter.emit_event(
            event_type="memory_posted", user_id=USER, family_unit_id=FAMILY, session_id=SESSION,
            metadata=METADATA,
        )  # fmt: skip

    write = floor(directory)
    if kind != "unprepared":
        emitter.prepare()
    with busy(threads):
        time.sleep(0.1)
        if kind in ("prepared", "unprepared"):
            return [once(emit)]
        if kind == "first write":
            return [once(write)]
        call = write if kind == "write" else emit
        for _ in range(200):
            call()
        samples = []
        for _ in range(pauses if kind == "pause" else STEADY):
            time.sleep(2.5 * seconds if kind == "pause" else GAP_SECONDS)
            samples.append(once(call))
        return samples


def run(kind: str, threads: int, given: argparse.Namespace) -> list[float]:
    samples: list[float] = []
    for _ in range(given.processes if kind in ("prepared", "unprepared", "first write") else 1):
        with tempfile.TemporaryDirectory(dir=given.directory) as directory:
            command = [sys.executable, "-m", __spec__.name, "--child", kind, "--threads", str(threads),
                       "--pauses", str(given.pauses), "--seconds", str(given.seconds),
                       "--directory", directory]  # fmt: skip
            samples += map(float, subprocess.check_output(command, text=True).split())
    return sorted(samples)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--processes", type=int, default=100)
    arguments.add_argument("--pauses", type=int, default=100)
    arguments.add_argument("--seconds", type=float, default=0.1, help="max_age; a pause is 2.5 of it")
    arguments.add_argument("--directory", type=Path)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    arguments.add_argument("--threads", type=int, default=0, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        print(*measure(given.directory, given.child, given.threads, given.pauses, given.seconds), flush=True)
        os._exit(0)
    print(f"{'':34s}{'p50':>10s}{'p99':>10s}{'max':>10s}")
    for threads in (0, BURNERS):
        for kind in ("steady", "pause", "prepared", "unprepared", "write", "first write"):
            samples = run(kind, threads, given)
            title = f"{kind}, {threads} busy threads" if threads else kind
            p99 = samples[min(len(samples) - 1, int(len(samples) * 0.99))]
            print(f"{title:34s}{statistics.median(samples):10.1f}{p99:10.1f}{samples[-1]:10.1f}", flush=True)


if __name__ == "__main__":
    main()
