"""Memory is bounded whatever is loaded: `pytest -m long -s tests/load/test_memory.py` prints peaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loader.load.database import Connection
from tests.load.lines import STEM, event, joined, segment
from tests.processes import LOADER, Cli

MOST_KIB = 150 << 10


def a_gibibyte_of_lines(spool: Path) -> None:
    with (spool / f"{STEM.format(1)}.ndjson").open("wb") as file:
        for first in range(0, 4_000_000, 10_000):
            file.write(joined(*[event(n) for n in range(first, first + 10_000)]))


def one_line_of_900_mb(spool: Path) -> None:
    with (spool / f"{STEM.format(1)}.ndjson").open("wb") as file:
        for _ in range(900):
            file.write(b"x" * 1_000_000)
        file.write(b"\n")


def fifty_thousand_files(spool: Path) -> None:
    for n in range(50_000):
        segment(spool, n + 1, event(n))


def collisions_with_a_large_row(spool: Path) -> None:
    segment(spool, 1, event(1, metadata={"big": "x" * 1_000_000}))
    segment(spool, 2, *[event(1, metadata={"n": n}) for n in range(1500)])


def nothing_but_rejects(spool: Path) -> None:
    segment(spool, 1, *[b"%x" % n for n in range(600_000)])


def many_waiting_files(spool: Path) -> None:
    for n in range(200_000):
        (spool / f"{STEM.format(n + 1)}.ndjson").touch()


@pytest.mark.long
@pytest.mark.parametrize(
    "fill",
    [
        a_gibibyte_of_lines, one_line_of_900_mb, fifty_thousand_files, collisions_with_a_large_row,
        nothing_but_rejects, many_waiting_files,
    ],
)  # fmt: skip
def test_memory_is_bounded(cli: Cli, one_connection: Connection, fill: Callable[[Path], None]) -> None:
    fill(cli.spool)
    # A child's peak begins with its parent's size (getrusage(2)), so a small parent asks.
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, *LOADER, "run", "--once"]
    peak = int(subprocess.check_output(command, env=cli.environment))
    print(f"{fill.__name__}: {peak >> 10} MiB")
    assert peak < MOST_KIB
