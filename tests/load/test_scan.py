"""A scan is bounded, whatever the spool contains, and returns the oldest files first."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from loader.files import retire
from loader.files.limits import CHUNK_BYTES
from loader.files.retire import SpoolFile, SpoolFiles
from loader.files.scan import backlog, scan
from loader.load.database import Connection
from tests.load.lines import STEM, event, number, rejected, segment
from tests.processes import Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"


def touch(directory: Path, numbers: range) -> None:
    for n in numbers:
        (directory / f"{STEM.format(n)}.ndjson").touch()


def test_a_scan_returns_the_oldest_and_reports_that_there_are_more(tmp_path: Path) -> None:
    touch(tmp_path, range(999, 0, -1))
    found = scan(tmp_path, limit=10)
    assert [path.name for path in found.sealed] == [f"{STEM.format(n)}.ndjson" for n in range(1, 11)]
    assert found.more
    known = {path.name for path in found.sealed}
    assert scan(tmp_path, limit=989, known=known).more is False
    assert len(scan(tmp_path, limit=989, known=known).sealed) == 989


def test_foreign_names_do_not_crowd_out_segments_and_are_reported_a_hundred_at_a_time(tmp_path: Path) -> None:
    for n in range(500):
        (tmp_path / f"0000-{n}.ndjson").touch()
    touch(tmp_path, range(1, 3))
    found = scan(tmp_path, limit=10)
    assert len(found.sealed) == 2 and len(found.skipped) == 101


def test_files_beyond_the_limit_come_with_the_next_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(50):
        segment(tmp_path, n + 1, event(n))
    monkeypatch.setattr(retire, "SCAN_FILES", 7)
    batches, seen = 0, list[str]()
    files = SpoolFiles(tmp_path)
    while batch := files.scan()[1]:
        for source in batch:
            list(source.chunks())
            source.retire(oversize=False)
        batches += 1
        seen += [source.name for source in batch]
    assert batches == 8 and seen == sorted(seen)
    assert not list(tmp_path.glob("2*"))


def test_the_memory_of_a_scan_does_not_depend_on_the_number_of_files(tmp_path: Path) -> None:
    touch(tmp_path, range(1, 20_001))
    tracemalloc.start()
    scan(tmp_path, limit=100)
    backlog(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_sparse_file_takes_no_time_and_is_kept(cli: Cli, one_connection: Connection) -> None:
    path = segment(cli.spool, 1, event(1))
    with path.open("r+b") as file:
        file.truncate(30 << 30)
    (cli.spool / f"{STEM.format(3)}.open").touch()
    with (cli.spool / f"{STEM.format(3)}.open").open("r+b") as file:
        file.truncate(30 << 30)
    segment(cli.spool, 2, event(2))
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) == 2, 10)
        eventually(lambda: not path.exists(), 30)  # its last line has no end
    assert [code for _, _, code in rejected(cli.spool)] == ["oversize"]
    assert (cli.spool / "rejected" / f"{path.stem}.whole").stat().st_size == 30 << 30


def test_a_hole_has_the_digest_of_its_zeros(tmp_path: Path) -> None:
    """So the ledger recognizes a copy that is not sparse."""
    size = 5 * CHUNK_BYTES + 12345
    content = b"x" * 10 + bytes(size) + b"y\n" + event(1) + b"\n"
    sparse, full = tmp_path / f"{STEM.format(1)}.ndjson", tmp_path / f"{STEM.format(2)}.ndjson"
    full.write_bytes(content)
    with sparse.open("wb") as file:
        file.write(content[:10])
        file.seek(10 + size)
        file.write(content[10 + size :])
    one, two = ([(c.offset, c.size, c.digest) for c in SpoolFile(path).chunks()] for path in (sparse, full))
    assert one == two and len(one) == 2
