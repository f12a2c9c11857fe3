"""A user with write access to the spool can neither make the loader touch other files nor control a terminal."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from loader.files import rejects
from loader.files.lock import exclusive, holder
from loader.files.rejects import Rejected
from loader.files.retire import SpoolFile
from loader.files.scan import scan
from loader.load.database import Connection
from spool import Emitter
from spool.segment import FILE_MODE, recover
from tests.emit.lines import emit
from tests.load.lines import STEM, event, joined, number, segment
from tests.processes import NOBODY, Cli, as_another_user, as_root, reachable_by_others

EVENTS = "SELECT count(*) FROM analytics_events"
GROUP = 2000


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Return a directory with a file that must not change."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "precious").write_bytes(joined(event(1)) + b"and more")
    return directory


def state(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("suffix", [".open", ".ndjson"])
def test_a_segment_that_is_a_link_is_not_followed(cli: Cli, outside: Path, suffix: str) -> None:
    before = state(outside)
    (cli.spool / (STEM.format(1) + suffix)).symlink_to(outside / "precious")
    assert "not a regular file" in cli("run", "--once")
    assert state(outside) == before


def test_an_open_segment_that_is_a_hard_link_is_not_cut(
    cli: Cli, one_connection: Connection, outside: Path
) -> None:
    before = state(outside)
    planted = cli.spool / f"{STEM.format(1)}.open"
    planted.hardlink_to(outside / "precious")
    assert "second name" in cli("run", "--once")
    assert state(outside) == before and planted.exists()
    (outside / "precious").unlink()
    assert "events 1" in cli("run", "--once")


def test_backfill_of_a_directory_does_not_follow_a_link_in_it(
    cli: Cli, one_connection: Connection, outside: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    (archive / "a.ndjson").symlink_to(outside / "precious")
    os.mkfifo(archive / "b.ndjson")
    (archive / "c.ndjson").write_bytes(joined(event(2)))
    printed = cli("backfill", archive, code=1)
    assert "a.ndjson could not be read" in printed and "b.ndjson could not be read" in printed
    assert number(one_connection, EVENTS) == 1
    assert "events 1" in cli("backfill", archive / "a.ndjson", code=3)  # a link named by the user


@pytest.mark.parametrize("plant", ["symlink", "hard link", "pipe"])
def test_a_lock_file_that_is_planted_writes_nowhere(cli: Cli, outside: Path, plant: str) -> None:
    before = state(outside)
    lock = cli.spool / ".loader.lock"
    if plant == "symlink":
        lock.symlink_to(outside / "precious")
    elif plant == "hard link":
        lock.hardlink_to(outside / "precious")
    else:
        os.mkfifo(lock)
    assert "remove it" in cli("run", "--once", code=1)
    assert "remove it" in cli("status", code=1)
    assert state(outside) == before


def test_rejects_do_not_go_through_a_link(cli: Cli, outside: Path) -> None:
    before = state(outside)
    (cli.spool / "rejected").symlink_to(outside)
    segment(cli.spool, 1, b"{broken")
    printed = cli("run", "--once", code=1)
    assert "rejects could not be written" in printed and "move it away" in printed
    assert "move it away" in cli("rejects", "list", code=1)
    assert state(outside) == before
    (cli.spool / "rejected").unlink()
    assert "rejected 1" in cli("run", "--once", code=3)


def test_a_reject_file_that_is_a_link_is_neither_read_nor_replaced(cli: Cli, outside: Path) -> None:
    before = state(outside)
    path = segment(cli.spool, 1, b"{broken")
    (cli.spool / "rejected").mkdir()
    name = f"{path.stem}-0-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.ndjson"
    (cli.spool / "rejected" / name).symlink_to(outside / "precious")
    (cli.spool / "rejected" / f"{path.stem}-0.part").symlink_to(outside / "precious")
    assert "rejected 1" in cli("run", "--once", code=3)
    assert "invalid_json 1" in cli("rejects", "list")
    cli("rejects", "retry", code=3)
    assert state(outside) == before


def test_a_name_with_a_newline_and_escape_codes_is_reported_in_one_plain_line(cli: Cli) -> None:
    name = "\x1b[2J\x9b31m\nERROR all is lost\u202e.ndjson"
    (cli.spool / name).write_bytes(joined(event(1)))
    (cli.spool / os.fsdecode(b"\xff\xfe.ndjson")).write_bytes(b"")
    printed = cli("run", "--once")
    assert printed.count("\n") == 3 and not {"\x1b", "\x9b", "\u202e"} & set(printed)
    assert (cli.spool / name).exists()
    assert not {"\x1b", "\x9b", "\u202e"} & set(cli("backfill", cli.spool / f"{name}x", code=2))


def test_a_reject_line_with_terminal_codes_is_shown_plain(cli: Cli) -> None:
    codes = "\\u001b]0;owned\\u0007\\u009b2J\\u202e[red]\\r"
    (cli.spool / "rejected").mkdir()
    (cli.spool / "rejected" / "a-0.ndjson").write_text(
        f'{{"file":"f{codes}","line":1,"code":"c{codes}","reason":"r{codes}","raw":"w{codes}"}}\n'
    )
    printed = cli("rejects", "show") + cli("rejects", "list") + cli("rejects", "show", "--json")
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(printed)
    assert "[red]" in printed


@pytest.mark.parametrize(
    ("size", "says"), [(1 << 29, "line 1: not a reject line"), (1 << 40, "move it away")]
)
def test_a_reject_file_with_a_line_without_end_is_refused(cli: Cli, size: int, says: str) -> None:
    (cli.spool / "rejected").mkdir()
    with (cli.spool / "rejected" / "a-0.ndjson").open("wb") as planted:
        planted.truncate(size)
    assert says in cli("rejects", "list", code=1)


@as_root
def test_a_spool_of_another_user_that_everyone_may_write_to_is_refused(cli: Cli) -> None:
    cli.spool.chmod(0o1777)
    cli("run", "--once")
    os.chown(cli.spool, NOBODY, NOBODY)
    printed = cli("run", "--once", code=2)
    assert "world-writable" in printed and "chmod o-w" in printed and printed.count("\n") == 1
    assert not (cli.spool / ".loader.lock").is_symlink()
    cli.spool.chmod(0o2770)
    cli("run", "--once")


def test_what_is_written_is_for_the_owner_and_the_group_alone(cli: Cli) -> None:
    before = os.umask(0)
    try:
        emitter = Emitter(cli.spool.parent / "new" / "spool")
        emit(emitter)
        emitter.close()
        segment(cli.spool, 1, b"{broken")
        cli("run", "--once", code=3)
    finally:
        os.umask(before)
    made = [cli.spool.parent / "new" / "spool", *emitter.settings.directory.iterdir()]
    for path in (*made, cli.spool / "rejected", cli.spool / ".loader.lock", *cli.spool.glob("rejected/*")):
        assert stat.S_IMODE(path.stat().st_mode) & ~(0o2770 if path.is_dir() else 0o640) == 0, path


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_segment_is_readable_for_its_group_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        emitter = Emitter(tmp_path)
        emit(emitter)
        emitter.close()
    finally:
        os.umask(before)
    (path,) = tmp_path.glob("*.ndjson")
    assert stat.S_IMODE(path.stat().st_mode) == FILE_MODE


@as_root
@pytest.mark.parametrize("tail", [b"", b'{"cut', b"\0" * 5000])
def test_a_segment_that_the_loader_may_only_read_is_sealed_as_a_copy(tmp_path: Path, tail: bytes) -> None:
    reachable_by_others(tmp_path)
    tmp_path.chmod(0o777)
    path = tmp_path / f"{STEM.format(1)}.open"
    path.write_bytes(joined(event(1), event(2)) + tail)
    path.chmod(0o644)
    assert as_another_user(lambda: recover(path)) == 0
    sealed = path.with_suffix(".ndjson")
    assert sealed.read_bytes() == joined(event(1), event(2)) and sealed.stat().st_uid == NOBODY
    assert [each.name for each in tmp_path.iterdir()] == [sealed.name]


@pytest.fixture
def shared_spool(tmp_path: Path) -> Path:
    """Return a group's spool, as on a host with different users for application and loader."""
    reachable_by_others(tmp_path)
    spool = tmp_path / "spool"
    spool.mkdir()
    os.chown(spool, 0, GROUP)
    spool.chmod(0o2770)
    return spool


@as_root
def test_application_and_loader_may_be_two_users_of_one_group(
    shared_spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.files.writing.GRACE_SECONDS", 0.0)  # another user's file cannot be leased

    def emit_and_die() -> None:
        os.umask(0o077)
        emitter = Emitter(shared_spool)
        emit(emitter)
        emitter.seal()
        emit(emitter)

    def load() -> None:
        found = scan(shared_spool)
        assert len(found.sealed) == 2 and len(found.adopted) == 1 and not found.skipped
        for path in found.sealed:
            source = SpoolFile(path, archive=shared_spool / "archive")
            assert [chunk.line_count for chunk in source.chunks()] == [1]
            source.retire(oversize=False)

    assert as_another_user(emit_and_die, 1001, GROUP) == 0
    assert as_another_user(load, 1002, GROUP) == 0
    assert [path.name for path in shared_spool.iterdir()] == ["archive"]


@as_root
def test_what_root_loads_by_hand_does_not_lock_the_loader_out(cli: Cli, one_connection: Connection) -> None:
    reachable_by_others(cli.spool.parent)
    os.chown(cli.spool, 1002, GROUP)
    cli.spool.chmod(0o2770)
    archive = cli.spool / "archive"
    segment(cli.spool, 1, event(1), b"{broken")
    cli("run", "--once", "--archive", archive, code=3)
    made = list(cli.spool.rglob("*"))
    assert len(made) >= 5 and {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(1002, GROUP)}


@as_root
def test_a_loader_follows_another_user_of_its_group(shared_spool: Path) -> None:
    def load(number: int) -> None:
        os.umask(0o022)
        with exclusive(shared_spool):
            assert str(os.getpid()) in str(holder(shared_spool))
            path = shared_spool / "rejected" / f"a-{number}.ndjson"
            rejects.replace(path, [Rejected("a", number, "code", "reason", b"raw")])
            rejects.replace(shared_spool / "rejected" / "a-1.ndjson", [])

    assert as_another_user(lambda: load(1), 1001, GROUP) == 0
    assert as_another_user(lambda: load(2), 1002, GROUP) == 0
    assert [path.name for path in rejects.files(shared_spool)] == ["a-2.ndjson"]


def test_an_open_copy_of_a_segment_that_waits_sealed_does_not_replace_it(
    cli: Cli, one_connection: Connection
) -> None:
    path = segment(cli.spool, 1, event(1), event(2))
    path.with_suffix(".open").write_bytes(joined(event(1)) + b"\0" * 100)
    assert "sealed name is taken" in cli("run", "--once")
    assert number(one_connection, EVENTS) == 2
    assert "duplicates 1" in cli("run", "--once")
    assert not list(cli.spool.glob("2*"))
