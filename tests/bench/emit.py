"""Benchmark of an emit against the floor and against alternatives, in one run.

    python -m tests.bench.emit [--repeats N] [--calls N] [--only WORD] [--situation WORD] [--directory DIR]

The floor is `os.write` of `orjson.dumps` of a ready record. Each sink is measured in a separate process,
alternating with the floor in blocks, because a machine's speed drifts; ratios are medians over the blocks and
then over the repeats. Four situations: alone; with 3 CPU-bound threads in the process; from 4 threads; from 4
processes. Then each sink is killed (SIGKILL) at a different moment, and the surviving records are counted.

The extra `bench` installs the alternatives; missing ones are skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import mmap
import os
import signal
import statistics
import struct
import sys
import tempfile
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from tests.bench.sinks import FLOOR, OURS, PEERS, Call, Sink

BLOCK = 250
BURNERS = 3
THREADS = 4
PROCESSES = 4
GAP_NS = 20_000
"""Between two calls beside busy threads, so that calls come at any moment of the others' turns."""
BUSY_NS = 4_000_000_000
"""Bound of one sink beside busy threads, where a call may take a tenth of a second."""
NEVER = 1 << 62
SETTLE_SECONDS = 0.5
"""Seconds to wait for a collector, which may still be receiving records after the kill."""

Block = Callable[[int], "array[int]"]


@dataclass(frozen=True)
class Figures:
    """Results of one sink in one situation, in microseconds; `ratio` and `tail`: p50 and p99.9 over the floor's."""

    p50: float
    p99: float
    p999: float
    max: float
    ratio: float
    tail: float
    floor_p99: float


def timed(call: Call, prepare: Call, gap: int, bound: int) -> Block:
    """Return a function that measures that many calls, one by one, in nanoseconds."""

    def block(count: int) -> array[int]:
        taken = array("Q")
        last = perf_counter_ns() + bound
        for _ in range(count):
            prepare()
            begin = perf_counter_ns()
            call()
            end = perf_counter_ns()
            taken.append(end - begin)
            while perf_counter_ns() - end < gap:
                pass
            if end > last:
                break
        return taken

    return block


def timed_await(call: Call, prepare: Call, gap: int, bound: int) -> Block:
    awaitable: Callable[[], Any] = call

    async def measure(count: int) -> array[int]:
        taken = array("Q")
        last = perf_counter_ns() + bound
        for _ in range(count):
            prepare()
            begin = perf_counter_ns()
            await awaitable()
            end = perf_counter_ns()
            taken.append(end - begin)
            while perf_counter_ns() - end < gap:
                pass
            if end > last:
                break
        return taken

    return lambda count: asyncio.run(measure(count))


def block_of(sink: Sink, home: Path, gap: int = 0, bound: int = NEVER) -> Block:
    home.mkdir(exist_ok=True)
    measure = timed_await if sink.awaited else timed
    return measure(sink.make(Path(tempfile.mkdtemp(dir=home))), sink.prepare, gap, bound)


Samples = tuple[list["array[int]"], list["array[int]"]]
"""Blocks of the floor and of the sink, taken in turns."""


def in_turns(floor: Block, sink: Block, calls: int) -> Samples:
    floors, sinks = [], []
    floor(BLOCK)
    sink(BLOCK)
    for _ in range(max(1, calls // BLOCK)):
        floors.append(floor(BLOCK))
        sinks.append(sink(BLOCK))
    return floors, sinks


def alone(sink: Sink, home: Path, calls: int) -> Samples:
    return in_turns(block_of(FLOOR, home), block_of(sink, home), calls)


def beside_busy_threads(sink: Sink, home: Path, calls: int) -> Samples:
    stop = False

    def burn() -> None:
        number = 0
        while not stop:
            number += 1

    floor, block = (block_of(each, home, GAP_NS, BUSY_NS) for each in (FLOOR, sink))
    for _ in range(BURNERS):
        threading.Thread(target=burn, daemon=True).start()
    try:
        return [floor(calls)], [block(calls)]
    finally:
        stop = True


def from_threads(sink: Sink, home: Path, calls: int) -> Samples:
    floor, block = block_of(FLOOR, home), block_of(sink, home)

    def together(single: Block) -> Block:
        def measure(count: int) -> array[int]:
            results: list[array[int]] = []
            threads = [threading.Thread(target=lambda: results.append(single(count))) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return array("Q", [each for result in results for each in result])

        return measure

    return in_turns(together(floor), together(block), calls // THREADS)


def from_processes(sink: Sink, home: Path, calls: int) -> Samples:
    parts = [
        start(partial(alone, sink, home / str(number), calls // PROCESSES)) for number in range(PROCESSES)
    ]
    floors, sinks = [], []
    for part in parts:
        theirs = part()
        floors += theirs[0]
        sinks += theirs[1]
    return floors, sinks


Situation = Callable[[Sink, Path, int], Samples]
SITUATIONS: dict[str, Situation] = {
    "alone": alone,
    f"with {BURNERS} CPU-bound threads": beside_busy_threads,
    f"from {THREADS} threads": from_threads,
    f"from {PROCESSES} processes": from_processes,
}


def start(work: Callable[[], Samples]) -> Callable[[], Samples]:
    """Run `work` in a forked process; return a waiter for its samples. Raises RuntimeError if it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            with open(writer, "wb") as pipe:
                for blocks in work():
                    pipe.write(struct.pack("Q", len(blocks)))
                    pipe.writelines(struct.pack("Q", len(block)) + block.tobytes() for block in blocks)
            status = 0
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)

    def wait() -> Samples:
        with open(reader, "rb") as pipe:
            data = memoryview(pipe.read()).cast("Q")
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("the measuring process failed")
        at, samples = 0, []
        for _ in range(2):
            blocks, at = [], at + 1
            for _ in range(data[at - 1]):
                blocks.append(array("Q", data[at + 1 : at + 1 + data[at]]))
                at += 1 + data[at]
            samples.append(blocks)
        return samples[0], samples[1]

    return wait


def figures(samples: Samples) -> Figures:
    floors, sinks = samples
    floor, sink = (sorted(each for block in blocks for each in block) for blocks in samples)
    ratios = [statistics.median(s) / statistics.median(f) for f, s in zip(floors, sinks, strict=True)]
    return Figures(
        p50=part(sink, 0.5), p99=part(sink, 0.99), p999=part(sink, 0.999), max=sink[-1] / 1000,
        ratio=statistics.median(ratios), tail=part(sink, 0.999) / part(floor, 0.999),
        floor_p99=part(floor, 0.99),
    )  # fmt: skip


def part(ordered: Sequence[int], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1000


def middle(several: Sequence[Figures]) -> Figures:
    """Return the median of each figure over the repeats."""
    names = Figures.__dataclass_fields__
    return Figures(*(statistics.median(getattr(each, name) for each in several) for name in names))


def killed(sink: Sink, moment: int) -> tuple[int, int]:
    """Kill a process after some calls; return how many had returned, and how many records survived."""
    with tempfile.TemporaryDirectory() as directory, mmap.mmap(-1, 8) as returned:
        home = Path(directory)
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                block = block_of(sink, home)
                number = 0
                while number < 100_000:
                    block(1)
                    number += 1
                    struct.pack_into("Q", returned, 0, number)
            os._exit(1)
        while struct.unpack("Q", returned)[0] < moment:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("the sink failed")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        time.sleep(SETTLE_SECONDS)  # collectors do not report when they have read everything
        return struct.unpack("Q", returned)[0], sink.survivors(home)


def tried(sink: Sink, home: Path) -> Samples:
    block_of(sink, home)(1)
    return [], []


def installed(sinks: Sequence[Sink]) -> list[Sink]:
    """Return the sinks that work here, each tried in a separate process."""
    found = []
    for sink in sinks:
        with tempfile.TemporaryDirectory() as directory, suppress(RuntimeError):
            start(partial(tried, sink, Path(directory)))()
            found.append(sink)
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--calls", type=int, default=20_000)
    arguments.add_argument("--only", default="", help="sinks with this in their name")
    arguments.add_argument("--situation", default="", help="situations with this in their name")
    arguments.add_argument("--directory", type=Path, help="where the sinks write; else a temporary one")
    given = arguments.parse_args()
    logging.disable(logging.NOTSET)
    sinks = [sink for sink in (FLOOR, *OURS, *installed(PEERS)) if given.only in sink.name]
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, times in microseconds", flush=True)
    for title, situation in SITUATIONS.items():
        if given.situation not in title:
            continue
        print(row(title, "p50", "p99", "p99.9", "max", "p50/floor", "p99.9/floor"))
        for sink in sinks:
            f = middle([measured(situation, sink, given) for _ in range(given.repeats)])
            numbers = (f.p50, f.p99, f.p999, f.max, f.ratio, f.tail)
            print(row(sink.name, *(f"{number:.2f}" for number in numbers)), flush=True)
    print(row("killed by SIGKILL", "returned", "outlived", "lost"))
    for sink in sinks:
        returned, outlived = killed(sink, 1000)
        print(row(sink.name, returned, outlived, max(0, returned - outlived)), flush=True)


def row(name: str, *cells: object) -> str:
    return f"{name:36s}" + "".join(f"{cell!s:>13s}" for cell in cells)


def measured(situation: Situation, sink: Sink, given: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        return figures(start(lambda: situation(sink, Path(directory), given.calls))())


if __name__ == "__main__":
    main()
