"""Copying a file into a spool, with pauses, loses no line, whatever the loader does in between."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loader.files import scan as scanning
from loader.files.retire import SpoolFiles
from loader.files.scan import scan
from loader.files.writing import Writing, leased
from loader.load.database import Connection
from spool import Emitter
from tests.load.lines import ID, STEM, event, joined, number, rejected, segment
from tests.processes import NOBODY, Cli, as_another_user, as_root, eventually, reachable_by_others

EVENTS = "SELECT count(*) FROM analytics_events"
LEDGER = "SELECT sum(lines) FROM analytics_loads"


def data(first: int, last: int) -> bytes:
    return joined(*[event(n) for n in range(first, last)])


@pytest.mark.parametrize("cut", [0, 7])
def test_a_copy_that_pauses_is_loaded_at_once_and_removed_when_it_is_done(
    cli: Cli, one_connection: Connection, cut: int
) -> None:
    """Also with a pause in the middle of a line: half a line is not a reject."""
    path = cli.spool / f"{STEM.format(1)}.ndjson"
    whole = data(0, 30)
    end = len(data(0, 10)) + cut
    with cli.daemon(), path.open("wb", buffering=0) as copy:
        copy.write(whole[:end])
        eventually(lambda: number(one_connection, EVENTS) == 10)
        segment(cli.spool, 2, event(100))  # the following files are not blocked
        eventually(lambda: number(one_connection, EVENTS) == 11)
        assert path.exists()
        copy.write(whole[end : end + 500])
        eventually(lambda: number(one_connection, EVENTS) > 11)
        copy.write(whole[end + 500 :])
        copy.close()
        eventually(lambda: number(one_connection, EVENTS) == 31)
        eventually(lambda: not path.exists())
    assert not rejected(cli.spool)
    assert number(one_connection, LEDGER) == 31  # each line was counted once


def test_a_scan_waits_for_an_append_to_a_file_that_ends_in_the_middle_of_a_line(
    cli: Cli, one_connection: Connection
) -> None:
    path = cli.spool / f"{STEM.format(1)}.ndjson"
    whole = data(0, 2)
    with cli.daemon():
        path.write_bytes(whole[:-20])
        eventually(lambda: number(one_connection, EVENTS) == 1)
        with path.open("ab") as copy:
            copy.write(whole[-20:])
        eventually(lambda: number(one_connection, EVENTS) == 2)
        eventually(lambda: not path.exists())
    assert not rejected(cli.spool)


def test_a_file_that_ends_in_the_middle_of_a_line_is_rejected_in_the_end(
    cli: Cli, one_connection: Connection
) -> None:
    path = cli.spool / f"{STEM.format(1)}.ndjson"
    path.write_bytes(data(0, 2)[:-20])
    assert "events 1" in cli("run", "--once", code=3)
    assert len(rejected(cli.spool)) == 1 and not path.exists()


def test_a_last_line_that_is_whole_without_its_newline_is_loaded(
    cli: Cli, one_connection: Connection
) -> None:
    (cli.spool / f"{STEM.format(1)}.ndjson").write_bytes(data(0, 2)[:-1])
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) == 2, 5)


def test_what_is_appended_between_load_and_retire_is_loaded(tmp_path: Path) -> None:
    path = segment(tmp_path, 1, event(1))
    files = SpoolFiles(tmp_path)
    _, (source,) = files.scan()
    assert [chunk.line_count for chunk in source.chunks()] == [1]
    with path.open("ab") as file:
        file.write(joined(event(2)))
    source.retire(oversize=False)
    assert path.exists()
    (again,) = eventually(lambda: files.scan()[1])
    assert [chunk.offset for chunk in again.chunks()] == [0, len(joined(event(1)))]
    again.retire(oversize=False)
    assert not path.exists() and files.scan()[1] == []


def test_a_file_that_cannot_be_leased_stays_until_it_has_not_changed_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a file of another user, whose lease is refused (fcntl(2): EACCES)."""
    path = segment(tmp_path, 1, event(1))
    pretended = 0.0
    monkeypatch.setattr("loader.files.writing.fcntl.F_SETLEASE", 99999)
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + pretended)
    files = SpoolFiles(tmp_path)
    _, (source,) = files.scan()
    list(source.chunks())
    source.retire(oversize=False)
    assert path.exists() and files.scan()[1] == [] and files.unsettled() == [path.name]
    pretended = 11.0
    assert files.scan()[1] == [] and not path.exists()


@as_root
def test_a_segment_of_another_user_is_removed_at_once_if_it_was_seen_open(tmp_path: Path) -> None:
    """Its lease is refused. A file that got its sealed name in another way may be a copy in progress."""
    reachable_by_others(tmp_path)
    os.chown(tmp_path, -1, NOBODY)
    tmp_path.chmod(0o2777)
    emitter = Emitter(tmp_path, max_age=600)

    def load_all(files: SpoolFiles) -> None:
        for source in files.scan()[1]:
            assert list(source.chunks())
            source.retire(oversize=False)

    def check() -> None:
        files = SpoolFiles(tmp_path)
        load_all(files)  # sees the segment while it is open
        ready.set()
        eventually(lambda: any(tmp_path.glob("*.ndjson")))
        load_all(files)
        assert not list(tmp_path.glob("*.ndjson"))
        copied.set()
        eventually(lambda: any(tmp_path.glob("*.ndjson")))
        load_all(files)
        assert files.unsettled() and any(tmp_path.glob("*.ndjson"))

    ready, copied = (multiprocessing.get_context("fork").Event() for _ in range(2))
    emitter.emit_event(event_type="a", user_id=ID, family_unit_id=ID)
    begun = min(tmp_path.glob("*.open"))  # there may be a spare, too

    def write() -> None:
        assert ready.wait(60)
        emitter.seal()
        assert copied.wait(60)
        begun.with_suffix(".new").write_bytes(joined(event(1)))
        begun.with_suffix(".new").rename(begun.with_suffix(".ndjson"))

    writing = threading.Thread(target=write)
    writing.start()
    assert as_another_user(check) == 0
    writing.join()
    emitter.close()


def test_an_open_segment_that_nobody_has_locked_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a copy that is created under the same name, and then renamed."""
    monkeypatch.setattr("loader.files.writing.fcntl.F_SETLEASE", 99999)
    path = tmp_path / f"{STEM.format(1)}.open"
    path.write_bytes(joined(event(1)))
    files = SpoolFiles(tmp_path)
    files.note_open(path)
    files.scan()
    path.rename(path.with_suffix(".ndjson"))
    (source,) = files.scan()[1]
    list(source.chunks())
    source.retire(oversize=False)
    assert files.unsettled()


def test_an_old_file_is_removed_at_once_although_it_cannot_be_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.files.writing.fcntl.F_SETLEASE", 99999)
    monkeypatch.setattr("loader.files.writing.age", lambda _: 60.0)
    path = segment(tmp_path, 1, event(1))
    files = SpoolFiles(tmp_path)
    _, (source,) = files.scan()
    list(source.chunks())
    source.retire(oversize=False)
    assert not path.exists()


def test_a_child_that_inherited_a_segment_is_not_taken_for_a_writer(tmp_path: Path) -> None:
    """Its descriptor still has the flock of the segment's writer; a copy has none."""
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); exec(sys.argv[2]); print(flush=True); input()"
    path = segment(tmp_path, 1, event(1))
    for lock, expected in (("fcntl.flock(f, 2)", Writing.UNKNOWN), ("pass", Writing.SOMEBODY)):
        command = [sys.executable, "-c", code, str(path), lock]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            with path.open("rb") as file, leased(file.fileno()) as writing:
                assert writing is expected
            child.communicate(b"\n")
    with path.open("rb") as file, leased(file.fileno()) as writing:
        assert writing is Writing.NOBODY


def test_a_copy_of_an_open_segment_is_sealed_when_it_is_whole(cli: Cli, one_connection: Connection) -> None:
    path = cli.spool / f"{STEM.format(1)}.open"
    whole = data(0, 3) + bytes(100_000)
    with cli.daemon(), path.open("wb", buffering=0) as copy:
        copy.write(whole[:250])
        segment(cli.spool, 2, event(100))
        eventually(lambda: number(one_connection, EVENTS) == 1)
        segment(cli.spool, 3, event(101))
        eventually(lambda: number(one_connection, EVENTS) == 2)
        assert path.exists()
        copy.write(whole[250:])
        copy.close()
        eventually(lambda: number(one_connection, EVENTS) == 5)
    assert not rejected(cli.spool)


# ---- locks that other hosts do not see -------------------------------------------------------------------

HOST = socket.gethostname()
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
NAME = "20260120T120000.000000Z-{host}-{boot}-42-deadbeef-000001.open"


@pytest.mark.parametrize(
    ("host", "boot", "adopted"),
    [(HOST, BOOT, True), ("a-b.c", BOOT, True), (HOST, "00000000", True), ("a-b.c", "00000000", False)],
)
@pytest.mark.parametrize("network", ["nfs", None])
def test_a_segment_of_another_host_is_adopted_only_if_its_lock_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, boot: str, adopted: bool, network: str | None
) -> None:
    monkeypatch.setattr(scanning, "network_type", lambda _: network)
    path = tmp_path / NAME.format(host=host, boot=boot)
    path.write_bytes(data(0, 1))
    found = scan(tmp_path)
    assert bool(found.sealed) is (adopted or network is None)
    if not found.sealed:
        assert f"loader run --once --adopt {host}" in found.skipped[path.name]
        assert path.exists() and scan(tmp_path, adopt=[host]).sealed


PRELOAD = """
#include <string.h>
int flock(int fd, int how) { return 0; }
int statfs(const char *path, void *out) { memset(out, 0, 120); *(long *)out = 0x6969; return 0; }
"""


@pytest.fixture
def nfs(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which flock always succeeds, and each file system is NFS."""
    (tmp_path / "nfs.c").write_text(PRELOAD)
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", "nfs.so", "nfs.c"], check=True, cwd=tmp_path)
    except FileNotFoundError:
        pytest.skip("gcc is not installed")
    return {"LD_PRELOAD": str(tmp_path / "nfs.so")}


def test_a_living_writer_on_another_host_keeps_its_segment(
    cli: Cli, one_connection: Connection, nfs: dict[str, str]
) -> None:
    path = cli.spool / NAME.format(host="elsewhere", boot="00000000")
    path.write_bytes(data(0, 1) + bytes(1 << 20))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        printed = cli("run", "--once", variables=nfs)
        assert "loader run --once --adopt elsewhere" in printed and path.stat().st_size > 1 << 20
        mapped.seek(len(data(0, 1)))
        mapped.write(data(1, 2))  # SIGBUS at the cut
    doctor = cli("doctor", variables=nfs, code=None)
    assert "elsewhere" in doctor
    assert "events 2" in cli("run", "--once", "--adopt", "elsewhere", variables=nfs)


def test_segments_of_a_host_are_adopted_beside_a_running_loader(
    cli: Cli, one_connection: Connection, nfs: dict[str, str]
) -> None:
    (cli.spool / NAME.format(host="elsewhere", boot="00000000")).write_bytes(data(0, 1))
    with cli.daemon():
        eventually(lambda: number(one_connection, EVENTS) == 1)  # not on NFS
    assert not list(cli.spool.glob("2*"))


# ---- what somebody else holds ----------------------------------------------------------------------------


def test_a_segment_that_somebody_holds_is_reported(cli: Cli) -> None:
    path = cli.spool / f"{STEM.format(1)}.open"
    path.write_bytes(data(0, 1))
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); input()"
    holding = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert str(child.pid) in cli("doctor", code=None)
        assert "stale segments" in cli("status") and '"stale_segments": 1' in cli("status", "--json")
        child.communicate(b"\n")


def test_a_lock_file_that_somebody_else_holds_is_reported(cli: Cli) -> None:
    cli("run", "--once")
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); input()"
    holding = [sys.executable, "-c", code, str(cli.spool / ".loader.lock")]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        words = f"process {child.pid}"
        for printed in (cli("doctor", code=None), cli("status"), cli("run", "--once", code=1)):
            assert words in printed
        child.communicate(b"\n")
