"""A full disk or a removed directory causes no exception and no SIGBUS, and drops are counted."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import Emitter
from spool.metrics import DROPPED_METRIC
from spool.segment import recover, written_bytes
from tests import disks
from tests.disks import fill
from tests.emit.lines import emit, ids, interrupted, lines
from tests.processes import eventually

MAX_AGE = 0.2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a tmpfs of 16 MiB."""
    with disks.small_disk(tmp_path / "disk", "size=16m") as disk:
        yield disk


def reported(directory: Path) -> int:
    """Return how many drops the metrics report."""
    return sum(int(line["value"]) for line in lines(directory) if line.get("metric_name") == DROPPED_METRIC)


def removed(directory: Path) -> bool:
    """Remove a directory; return whether it succeeded, because its writer may write to it in between."""
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about disks: emitters of other tests report drops of other causes."""
    return [record.levelname for record in caplog.records if "dropped (disk)" in record.message]


def recovers(emitter: Emitter, directory: Path) -> None:
    """Check that lines are written again within two `max_age`, and that a metric reports the drops."""
    deadline = time.monotonic() + 2 * MAX_AGE + 1.0  # one second more for a busy machine
    while emit(emitter) is None:
        assert time.monotonic() < deadline
    eventually(lambda: reported(directory) == sum(emitter.stats().dropped.values()))


def test_a_full_disk_drops_counts_warns_once_and_recovers(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    emitter = Emitter(small_disk / "spool", max_age=MAX_AGE)
    kept = [emit(emitter, text="x" * 200)]
    filler = fill(small_disk)
    with caplog.at_level(logging.WARNING):
        kept += [emit(emitter, text="x" * 200) for _ in range(20_000)]
    assert kept.count(None) > 0 and kept.count(None) < len(kept)
    assert emitter.stats().dropped == {"disk": kept.count(None)}
    eventually(lambda: warnings(caplog))
    assert warnings(caplog) == ["WARNING"]
    assert all(record.threadName != "MainThread" for record in caplog.records), "logged by who emits"
    filler.unlink()
    recovers(emitter, small_disk / "spool")
    emitter.close()
    assert set(ids(small_disk / "spool")) >= set(filter(None, kept))


@pytest.mark.parametrize("replaced", [False, True])
def test_lines_survive_the_removal_of_the_directory_under_a_living_emitter(
    tmp_path: Path, replaced: bool
) -> None:
    spool = tmp_path / "spool"
    emitter = Emitter(spool, max_age=60)
    for _ in range(3):
        kept = [emit(emitter) for _ in range(100)]
        eventually(lambda: removed(spool))
        if replaced:
            spool.mkdir(exist_ok=True)  # the emitter may have recreated it
        kept += [emit(emitter) for _ in range(100)]
        assert emitter.seal()
        assert ids(spool) == kept
    emitter.close()
    assert {file.suffix for file in spool.iterdir()} == {".ndjson"}


READ_ONLY = """
import os, sys, time
from spool import Emitter
import uuid
user = uuid.uuid4()
os.setuid(65534)
emitter = Emitter(sys.argv[1], max_age=0.2)
def emit():
    return emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user)
def report(*words):
    print(*words, flush=True)
    sys.stdin.readline()
report("kept", emit())
deadline = time.monotonic() + 20
while emit():
    assert time.monotonic() < deadline
    emitter.seal()
report("dropped", sum(emitter.stats().dropped.values()))
deadline = time.monotonic() + 1.4
while not emit():
    assert time.monotonic() < deadline, "did not recover"
emitter.close()
report("dropped", sum(emitter.stats().dropped.values()))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
def test_a_directory_that_is_made_read_only_drops_and_recovers(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    spool = tmp_path / "spool"
    spool.mkdir()
    os.chown(spool, 65534, 65534)
    process = subprocess.Popen(
        [sys.executable, "-c", READ_ONLY, str(spool)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    for mode in (0o500, 0o700, 0o700):
        assert process.stdout.readline().split()[1] not in ("None", "0")
        spool.chmod(mode)
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait() == 0
    assert reported(spool) > 0


def test_a_directory_that_cant_be_is_counted_and_forgotten_once_it_can(tmp_path: Path) -> None:
    blocked = tmp_path / "spool"
    blocked.write_text("a file, not a directory")
    emitter = Emitter(blocked, max_age=MAX_AGE)
    assert emit(emitter) is None
    assert emitter.stats().dropped == {"disk": 1}
    blocked.unlink()
    recovers(emitter, blocked)
    emitter.close()


def test_drops_are_reported_even_if_nothing_more_is_emitted(tmp_path: Path) -> None:
    blocked = tmp_path / "spool"
    blocked.write_text("a file, not a directory")
    emitter = Emitter(blocked, max_age=MAX_AGE)
    emit(emitter)
    blocked.unlink()
    eventually(lambda: blocked.is_dir() and reported(blocked) == 1)
    emitter.close()


def measured(directory: Path) -> int:
    """Return the size of the spool: the minimum of several, because a segment renamed in between counts twice."""
    return min(written_bytes(directory) for _ in range(5))


def test_a_spool_never_grows_beyond_its_limit(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=MAX_AGE, segment_bytes=8192, max_spool_bytes=65536)
    kept = [emit(emitter, text="x" * 500) for _ in range(1000)]
    assert measured(tmp_path) <= 65536
    assert emitter.stats().dropped == {"spool_full": kept.count(None)}
    for file in tmp_path.glob("*.ndjson"):
        file.unlink()
    recovers(emitter, tmp_path)
    emitter.close()


def test_a_limit_counts_what_is_written_not_what_is_reserved(tmp_path: Path) -> None:
    """Each job that is killed by a signal leaves 64 KiB, mostly NUL bytes."""
    code = (
        "import os, sys, uuid\nfrom spool import Emitter\nemitter = Emitter(sys.argv[1])\n"
        "assert emitter.increment_counter(metric_name='jobs')\nos._exit(0)\n"
    )
    for _ in range(8):
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.open")) >= 8 * 65536
    assert written_bytes(tmp_path) < 8 * 1024
    emitter = Emitter(tmp_path, max_age=MAX_AGE, segment_bytes=65536, max_spool_bytes=4 * 65536)
    emitter.prepare()
    eventually(lambda: emitter._appender._limit._measured_at)
    assert None not in [emit(emitter) for _ in range(100)]
    emitter.close()


def test_an_emit_never_scans_the_spool(tmp_path: Path) -> None:
    for number in range(20_000):
        (tmp_path / f"{number}.ndjson").touch()
    emitter = Emitter(tmp_path, max_age=60)
    times = []
    for _ in range(2000):
        begin = time.perf_counter()
        emit(emitter, text="x" * 500)
        times.append(time.perf_counter() - begin)
    emitter.close()
    begin = time.perf_counter()
    written_bytes(tmp_path)
    assert sum(times) < 10 * (time.perf_counter() - begin) and sorted(times)[1900] < 0.001


def test_an_unfinished_segment_of_a_dead_writer_is_removed_and_of_a_living_one_stays(tmp_path: Path) -> None:
    stem = "20261123T120000.000000Z-host-01234567-1-89abcdef-{:06d}.new"
    for number, age in ((1, 3600), (2, 0), (3, 3600)):
        file = tmp_path / stem.format(number)
        file.touch()
        os.utime(file, (time.time() - age, time.time() - age))
    with (tmp_path / stem.format(3)).open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        written_bytes(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [stem.format(2), stem.format(3)]


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    """Yield a btrfs of 128 MiB in a file."""
    image, disk = tmp_path / "image", tmp_path / "btrfs"
    disk.mkdir()
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed (package btrfs-progs)")
    with image.open("wb") as file:
        file.truncate(128 << 20)
    made = subprocess.run(["mkfs.btrfs", "-q", image], capture_output=True)
    if (
        made.returncode
        or subprocess.run(["mount", "-o", "loop", image, disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a btrfs takes a privilege or a kernel that is not here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_btrfs_drops_and_counts_without_sigbus_or_a_wait(btrfs: Path) -> None:
    code = """
import sys, time, uuid
from spool import Emitter
user = uuid.uuid4()
emitter = Emitter(sys.argv[1] + "/spool", max_age=60)
def emit():
    begin = time.perf_counter()
    made = emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user, metadata={"t": "x" * 900})
    return made, time.perf_counter() - begin
kept = [emit() for _ in range(10)]
with open(sys.argv[1] + "/filler", "wb", buffering=0) as filler:
    for size in (1 << 20, 1 << 12):
        try:
            while True: filler.write(b"x" * size)
        except OSError: pass
kept += [emit() for _ in range(300)]
print(max(seconds for _, seconds in kept))
print(*[made for made, _ in kept if made])
import os
os.remove(sys.argv[1] + "/filler")
emitter.close()
"""
    child = subprocess.run([sys.executable, "-c", code, btrfs], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, (child.returncode, child.stderr)
    longest, *kept = child.stdout.split()
    for file in (btrfs / "spool").glob("*.open"):
        recover(file)
    assert float(longest) < 5 and len(kept) >= 10
    assert set(kept) <= set(ids(btrfs / "spool"))


@pytest.mark.parametrize("kind", ["btrfs", "tmpfs"])
def test_only_a_file_system_that_overwrites_in_place_is_mapped(
    kind: str, request: pytest.FixtureRequest
) -> None:
    disk = request.getfixturevalue("btrfs" if kind == "btrfs" else "small_disk")
    emitter = Emitter(disk / "spool")
    emitter.prepare()
    current = emitter._appender._state.current
    assert current is not None and current.is_mapped() is (kind == "tmpfs")
    emitter.close()


def test_threads_that_write_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Without a map, each thread uses a separate segment."""
    emitter = Emitter(tmp_path, mapped=False, max_age=0.2)
    kept: list[str | None] = []
    threads = [
        threading.Thread(target=lambda: kept.extend([emit(emitter) for _ in range(2000)])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emitter.close()
    assert None not in kept and sorted(ids(tmp_path)) == sorted(filter(None, kept))
    assert len(list(tmp_path.iterdir())) < 200


@pytest.fixture
def no_maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate a file system that cannot map, and check that mapping was attempted."""
    asked = []

    def refuse(*_: object) -> None:
        asked.append(True)
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    yield
    assert asked


@pytest.mark.usefixtures("no_maps")
def test_if_files_cannot_be_mapped_lines_are_written_and_nothing_is_lost(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, segment_bytes=4096, max_age=0.05)
    with interrupted(emitter) as kept:
        own = [emit(emitter) for _ in range(3000)]
    emitter.close()
    assert kept and None not in [*kept, *own]
    assert sorted(ids(tmp_path)) == sorted(filter(None, [*kept, *own]))


@pytest.mark.usefixtures("no_maps")
def test_a_written_segment_on_a_full_disk_keeps_what_it_acknowledged(small_disk: Path) -> None:
    emitter = Emitter(small_disk / "spool", max_age=MAX_AGE)
    kept = [emit(emitter)]
    filler = fill(small_disk)
    kept += [emit(emitter, text="x" * 500) for _ in range(1000)]
    assert None in kept
    filler.unlink()
    recovers(emitter, small_disk / "spool")
    emitter.close()
    assert set(ids(small_disk / "spool")) >= set(filter(None, kept))
