"""A spool on a full disk: loadable files are loaded, which frees space, and then the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.errors import LoaderError
from loader.files import lock
from loader.load.database import Connection
from tests import disks
from tests.disks import fill
from tests.load.lines import event, number, rejected, segment
from tests.processes import Cli, as_root, eventually

EVENTS = "SELECT count(*) FROM analytics_events"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a spool on a separate file system of 1 MiB."""
    with disks.small_disk(tmp_path / "small", "size=1m,nr_inodes=60,mode=770") as spool:
        yield spool


@as_root
@pytest.mark.parametrize("bad", [[1], [1, 2, 3, 4, 5, 20]])
def test_files_whose_rejects_cannot_be_written_hold_up_no_others(
    cli: Cli, one_connection: Connection, small_disk: Path, bad: list[int]
) -> None:
    cli = Cli(small_disk, cli.dsn)
    for n in range(1, 21):
        segment(small_disk, n, event(n), *([b"{broken"] if n in bad else []))
    filler = fill(small_disk)
    filler_of_pages = small_disk / "more"
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) >= 20 - len(bad))
        eventually(lambda: number(one_connection, EVENTS) == 20, 60)  # the removed files made room
        eventually(lambda: not list(small_disk.glob("2*")))
    assert len(rejected(small_disk)) == len(bad)
    assert filler.exists() and not filler_of_pages.exists()


@as_root
def test_rejects_that_never_fit_keep_their_files_and_are_reported(
    cli: Cli, one_connection: Connection, small_disk: Path
) -> None:
    cli = Cli(small_disk, cli.dsn)
    kept = segment(small_disk, 1, event(1), b"{" + b"x" * 100_000)
    segment(small_disk, 2, event(2))
    fill(small_disk)
    printed = cli("run", "--once", "--json", code=1)
    facts = json.loads(printed.splitlines()[0])
    assert facts["events"] == 1 and "rejects could not be written" in facts["failures"][kept.name]
    assert "No space left" in facts["failures"][kept.name] and kept.exists()
    (small_disk / "filler").unlink()
    cli("run", "--once", code=3)
    assert number(one_connection, EVENTS) == 2


@as_root
@pytest.mark.parametrize("inodes", [False, True])
def test_a_loader_starts_although_its_lock_file_cannot_be_written(small_disk: Path, inodes: bool) -> None:
    fill(small_disk)
    if inodes:
        with pytest.raises(OSError):
            for n in range(1000):
                (small_disk / f"{n}").touch()
    with lock.exclusive(small_disk):
        if inodes:
            (small_disk / "1").unlink()  # now there is space for a lock file
        with pytest.raises(LoaderError, match="already has a loader"), lock.exclusive(small_disk):
            pass
    with lock.exclusive(small_disk):
        pass
