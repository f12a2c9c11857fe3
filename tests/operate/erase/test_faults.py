"""An erasure survives kills, restores, files of other users and a thousand people."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import time
import uuid
from hashlib import sha256
from pathlib import Path

import orjson
import pytest

from loader.load.database import Connection
from tests.load.lines import event, number, rejected, rows, segment
from tests.operate.erase import story
from tests.operate.erase.story import ANNA, BERT, CARL, OTHER_HOME, facts, mentioning, of
from tests.processes import LOADER, Cli, as_root, needs_strace

CALLS = "sendto,rename,renameat,renameat2,unlink,unlinkat,fsync"


def fill(cli: Cli, archive: Path) -> None:
    """Have lines of three people in rows, rejects, archive and spool."""
    lines = [of(ANNA, 1), of(BERT, 2), of(CARL, 3, OTHER_HOME), *mentioning(ANNA, 100)]
    segment(cli.spool, 1, *lines, of(ANNA, 4)[:-1], b"{broken")
    cli("run", "--once", "--archive", archive, code=3)
    segment(cli.spool, 2, of(ANNA, 5), of(BERT, 6))


def killed_at(cli: Cli, archive: Path, call: int) -> bool:
    """Kill an erasure at its n-th system call with an outside effect; return whether it made that many."""
    inject = ["-e", f"trace={CALLS}", "-e", f"inject={CALLS}:signal=KILL:when={call}"]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", *inject, *LOADER]
    erase = [*command, "erase", "--user", str(ANNA), "--archive", str(archive), "--verify"]
    ended = subprocess.run(erase, env=cli.owner().environment, capture_output=True)
    return ended.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)


def erased_after_all(cli: Cli, connection: Connection, archive: Path) -> None:
    others = rows(
        connection, f"{story.OTHERS[: story.OTHERS.index('ORDER')]} WHERE user_id <> '{ANNA}' ORDER BY 1"
    )
    facts(cli, "--user", str(ANNA), "--archive", archive, "--verify")
    cli("run", "--once", "--archive", archive, code=None)
    assert story.found_in_tables(connection, ANNA) == []
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    kept = rows(connection, story.OTHERS)
    assert [row[:3] for row in others] == [row[:3] for row in kept if row[0].int & 0xFFFF != 6]
    story.balanced(connection)
    assert number(connection, "SELECT sum(lines) FROM analytics_loads WHERE file LIKE 'rejected/%'") == 1
    assert [code for _, _, code in rejected(cli.spool)] == ["invalid_json"]


@needs_strace
@pytest.mark.long
@pytest.mark.parametrize("call", range(1, 60))
def test_an_erasure_that_is_killed_at_any_call_is_completed(
    cli: Cli, one_connection: Connection, tmp_path: Path, call: int
) -> None:
    fill(cli, tmp_path / "archive")
    killed_at(cli, tmp_path / "archive", call)
    erased_after_all(cli, one_connection, tmp_path / "archive")


@pytest.mark.long
def test_a_restored_database_forgets_them_again(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    fill(cli, archive)
    tables = ("analytics_events", "analytics_metrics", "analytics_loads")
    for table in tables:
        one_connection.execute(f"CREATE TABLE kept_{table} AS SELECT * FROM {table}".encode())
    one_connection.commit()
    facts(cli, "--user", str(ANNA), "--archive", archive)
    one_connection.execute("DELETE FROM analytics_erasures; DELETE FROM analytics_erasure_keys")
    one_connection.execute("INSERT INTO analytics_erasure_keys (key) VALUES (sha256('another'))")
    for table in tables:
        columns = (
            "digest, file, byte_offset, bytes, lines, events, metrics, duplicates, rejected, loader_host"
        )
        listed = columns if table == "analytics_loads" else "*"
        into = f"{table} ({columns})" if table == "analytics_loads" else table
        one_connection.execute(
            f"DELETE FROM {table}; INSERT INTO {into} SELECT {listed} FROM kept_{table}".encode()
        )
        one_connection.execute(f"DROP TABLE kept_{table}".encode())
    one_connection.commit()
    assert story.found_in_tables(one_connection, ANNA)
    erased = facts(cli, "--again", "--archive", archive, "--verify")
    assert (erased["people"], erased["events"]) == (1, 1)
    assert story.found_in_tables(one_connection, ANNA) == []
    segment(cli.spool, 3, of(ANNA, 7))
    assert "erased 2" in cli("run", "--once")  # one of them was in the spool
    assert facts(cli, "--again")["events"] == 0


def test_rows_that_were_restored_are_erased_again(cli: Cli, one_connection: Connection) -> None:
    facts(cli, "--user", str(ANNA))
    facts(cli, "--user", str(CARL))
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata) VALUES "
        f"(gen_random_uuid(), 'a', now(), '{ANNA}', '{ANNA}', '{{}}'), (gen_random_uuid(), 'a', now(), '{BERT}', "
        f"'{BERT}', '{{\"x\": \"{CARL}\"}}')".encode()
    )
    one_connection.commit()
    erased = facts(cli, "--again", "--verify")
    assert (erased["events"], erased["mentions"]) == (1, 1)
    assert number(one_connection, "SELECT count(*) FROM analytics_erasures WHERE proof IS NOT NULL") == 2


# ---- files of other users -------------------------------------------------------------------


def test_nothing_outside_is_touched(cli: Cli, tmp_path: Path) -> None:
    outside, archive, exports = tmp_path / "outside", tmp_path / "archive", tmp_path / "exports"
    for directory in (outside, archive, exports, cli.spool / "rejected"):
        directory.mkdir()
    for name in ("a.ndjson", "b.ndjson.zst", "c.csv", "d.whole"):
        (outside / name).write_bytes(of(ANNA, 1) + b"\n")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    for directory in (archive, exports, cli.spool / "rejected"):
        (directory / "day").symlink_to(outside)
        for name in before:
            (directory / name).symlink_to(outside / name)
        os.mkfifo(directory / "pipe.ndjson")
    (cli.spool / "20260120T120000.000000Z-web-0a1b2c3d-42-deadbeef-000001.ndjson").symlink_to(
        outside / "a.ndjson"
    )
    facts(cli, "--user", str(ANNA), "--archive", archive, "--exports", exports)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    linked = tmp_path / "linked"
    linked.symlink_to(outside)
    assert "is a link" in cli.owner()("erase", "--user", str(ANNA), "--archive", linked, code=1)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@as_root
@pytest.mark.parametrize(("owner", "mode"), [(65534, 0o600), (0, 0o666)])
def test_tombstones_that_somebody_planted_erase_nobody(
    cli: Cli, one_connection: Connection, owner: int, mode: int
) -> None:
    facts(cli, "--user", str(CARL))
    planted = cli.spool / ".erasures"
    known = orjson.loads(planted.read_bytes())
    key = bytes.fromhex(known["keys"][0])
    known["subjects"][sha256(key + ANNA.bytes).hexdigest()] = "user"
    planted.write_bytes(orjson.dumps(known))
    planted.chmod(mode)
    os.chown(planted, owner, owner)
    segment(cli.spool, 1, of(ANNA, 1))
    assert "events 1" in cli("run", "--once")
    assert facts(cli, "--again")["events"] == 0
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 1


@pytest.mark.long
def test_a_file_of_any_kind_is_searched(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    import bz2
    import lzma

    archive = tmp_path / "archive"
    archive.mkdir()
    lines = b"".join(
        line + b"\n" for line in (of(ANNA, 1), of(BERT, 2), of(BERT, 3, metadata={"a": ANNA.hex}))
    )
    for name, pack in (
        ("a.gz", gzip.compress),
        ("b.bz2", bz2.compress),
        ("c.xz", lzma.compress),
        ("d", bytes),
    ):
        (archive / name).write_bytes(pack(lines))
    (archive / f"{ANNA}.ndjson").write_bytes(lines[:0])
    (archive / "e.windows").write_bytes(lines.replace(b"\n", b"\r\n"))
    (archive / "f.marked").write_bytes(b"\xef\xbb\xbf" + of(BERT, 4, metadata={"a": ANNA.hex}) + b"\n")
    assert facts(cli, "--user", str(ANNA), "--archive", archive, "--verify")["archive_lines"] == 11
    assert not [path for path in archive.iterdir() if ANNA.hex in story.plain(path.name.encode())]
    assert gzip.decompress((archive / "a.gz").read_bytes()).count(b"\n") == 3
    assert len(bz2.decompress((archive / "b.bz2").read_bytes())) == len(lines)
    assert len(lzma.decompress((archive / "c.xz").read_bytes())) == len(lines)
    assert "lines 16, events 3, metrics 0, duplicates 2, rejected 0, erased 2, known 9" in cli(
        "backfill", archive
    )


@pytest.mark.long
def test_a_line_longer_than_a_chunk_is_erased(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    late = of(BERT, 1, metadata={"text": "x" * (20 << 20), "z": str(ANNA)})
    segment(cli.spool, 1, of(ANNA, 2), late, of(BERT, 3))
    cli("run", "--once", "--archive", archive, code=3)
    segment(cli.spool, 2, of(ANNA, 4, metadata={"text": "x" * (5 << 20)}), of(BERT, 5))
    before = sum(path.stat().st_size for path in cli.spool.rglob("*.whole"))
    facts(cli, "--user", str(ANNA), "--archive", archive)
    cli("run", "--once", "--archive", archive, code=None)
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    assert sum(path.stat().st_size for path in cli.spool.rglob("*000001.whole")) == before
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 2


@pytest.mark.long
def test_a_person_who_goes_on_is_erased_at_each_load(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    facts(cli, "--user", str(ANNA), "--archive", archive)
    for n in range(1, 4):
        segment(
            cli.spool, n, of(ANNA, n), of(ANNA, 10 + n)[:-1], of(BERT, 20 + n), b"{x" + str(ANNA).encode()
        )
        assert "events 1, metrics 0, duplicates 0, rejected 0, erased 3" in cli(
            "run", "--once", "--archive", archive
        )
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    assert "lines 4, events 0, metrics 0, duplicates 1, rejected 0, erased 3" in cli(
        "backfill", "--again", *archive.rglob("*1.ndjson.zst")
    )


# ---- a thousand people --------------------------------------------------------------------------------


def people(count: int) -> list[uuid.UUID]:
    return [uuid.uuid5(ANNA, str(n)) for n in range(count)]


def test_a_thousand_people_in_one_call(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    listed = tmp_path / "people"
    listed.write_text("\n".join(map(str, people(1000))))
    users = [*people(1000), *([BERT] * 200)]
    lines = [
        event(n, user_id=str(who), metadata={"friend": str(users[-n - 1])}) for n, who in enumerate(users)
    ]
    segment(cli.spool, 1, *lines)
    cli("run", "--once")
    erased = facts(cli, "--users-from", listed, "--verify")
    assert (erased["people"], erased["events"], erased["mentions"]) == (1000, 1000, 200)
    assert rows(one_connection, "SELECT DISTINCT user_id FROM analytics_events") == [(BERT,)]
    assert number(one_connection, "SELECT sum(events) FROM analytics_erasures") == 1000


@pytest.mark.long
def test_a_thousand_people_take_as_long_as_one(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    one_connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata) "
        "SELECT gen_random_uuid(), 'a', now(), md5((n % 9999)::text)::uuid, md5((n % 999)::text)::uuid, "
        "jsonb_build_object('memory_id', gen_random_uuid(), 'request_id', md5(n::text), 'n', n, 'text', repeat('x', 90)) "
        "FROM generate_series(1, 500000) AS n"
    )
    one_connection.commit()
    listed = tmp_path / "people"
    seconds: dict[int, list[float]] = {}
    for count in (1, 1000, 1, 1000):
        listed.write_text("\n".join(map(str, people(count))))
        begun = time.monotonic()
        facts(cli, "--users-from", listed)
        seconds.setdefault(count, []).append(time.monotonic() - begun)
    print(seconds)
    assert min(seconds[1000]) < 2 * min(seconds[1]) + 1
