"""An erased person's data is nowhere and does not come back when files are loaded again; other people lose nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loader.load.database import Connection
from tests.load.lines import number, rejected, rows, segment
from tests.operate.erase import story
from tests.operate.erase.story import ANNA, BERT, CARL, HOME, OTHER_HOME, facts, mentioning, of
from tests.processes import Cli


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def fill(cli: Cli, archive: Path, copies: Path) -> None:
    """Have lines of three people, and mentions of two of them, in rows, rejects and archive, and copies of it all."""
    copies.mkdir()
    first = [line for n in range(5) for line in (of(ANNA, n), of(BERT, 10 + n), of(CARL, 20 + n, OTHER_HOME))]
    first += mentioning(ANNA, 100) + mentioning(CARL, 200)
    broken = [
        of(ANNA, 300)[:-1] + b',"more":1}', of(BERT, 301)[:-1] + b',"more":1}',
        of(BERT, 302, metadata={"child": str(ANNA)})[:-1] + b',"more":1}',
        b"{broken " + ANNA.hex.encode(), b"{broken \xff" + str(ANNA).upper().encode(), b"{broken",
    ]  # fmt: skip
    for place, lines in enumerate((first, broken), 1):
        shutil.copy(segment(cli.spool, place, *lines), copies)
    cli("run", "--once", "--archive", archive, code=3)
    shutil.copytree(archive, copies / "archive")
    shutil.copytree(cli.spool / "rejected", copies / "kept")


@pytest.mark.long
def test_an_erased_person_is_nowhere_and_stays_so(
    cli: Cli, one_connection: Connection, archive: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    fill(cli, archive, copies)
    cli.owner()("rollup")
    others = [
        row for row in rows(one_connection, story.OTHERS) if ANNA.hex not in story.plain(str(row).encode())
    ]
    waiting = segment(cli.spool, 3, of(ANNA, 400), of(BERT, 401), *mentioning(ANNA, 500))
    shutil.copy(waiting, copies)
    (cli.spool / f"{waiting.stem[:-1]}4.open").write_bytes(of(ANNA, 600) + b"\n" + b"\0" * 4096)
    assert story.found_in_files(ANNA, cli.spool, archive) and story.found_in_tables(one_connection, ANNA)

    counts = facts(cli, "--user", ANNA.hex.upper(), "--archive", archive, "--dry-run")
    assert story.found_in_tables(one_connection, ANNA), "the dry run changed something"
    erased = facts(cli, "--user", ANNA.hex.upper(), "--archive", archive, "--verify")
    assert {**erased, "dry_run": True, "proof": None} == counts
    assert (erased["events"], erased["mentions"], erased["reject_lines"]) == (5, 16, 4)
    proof = erased["proof"]
    assert isinstance(proof, dict)
    assert sum(place["hits"] for place in proof["places"]) == 0 and len(proof["places"]) > 10
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    assert story.found_in_tables(one_connection, ANNA) == []
    assert number(one_connection, "SELECT count(*) FROM analytics_erasures WHERE proof IS NOT NULL") == 1

    for _ in range(2):
        cli("run", "--once", "--archive", archive, code=None)
        cli("rejects", "retry", code=None)
        cli("backfill", copies, code=None)
        cli("backfill", "--again", copies, code=None)
        cli("backfill", "--again", archive, code=None)
        for path in (copies / "kept").glob("*.ndjson"):
            shutil.copy(path, cli.spool / "rejected")
        cli("rejects", "retry", code=None)
        for path in copies.glob("*.ndjson"):
            shutil.copy(path, cli.spool)
    cli("run", "--once", "--archive", archive, code=None)
    assert story.found_in_tables(one_connection, ANNA) == []
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    assert [row for row in rows(one_connection, story.OTHERS) if row in others] == others
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == number(
        one_connection, "SELECT count(DISTINCT event_id) FROM analytics_events"
    )
    story.balanced(one_connection)
    codes = {code for _, _, code in rejected(cli.spool)}
    assert "collision" not in codes, rejected(cli.spool)


def test_a_family_is_erased_with_the_events_in_it(
    cli: Cli, one_connection: Connection, archive: Path
) -> None:
    segment(
        cli.spool, 1, of(ANNA, 1), of(BERT, 2), of(ANNA, 3, OTHER_HOME), *mentioning(HOME, 100, CARL)[1::2]
    )
    cli("run", "--once", "--archive", archive)
    erased = facts(cli, "--family", str(HOME), "--archive", archive, "--verify")
    assert erased["events"] == 3  # one is Carl's, who has mentioned the family as his session
    assert story.found_in_files(HOME, cli.spool, archive) == []
    assert story.found_in_tables(one_connection, HOME) == []
    assert rows(one_connection, "SELECT user_id FROM analytics_events") == [(ANNA,)]
