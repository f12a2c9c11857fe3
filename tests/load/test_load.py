"""Each line becomes exactly one row, counted duplicate or reject with a reason."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import psycopg
import pytest

from loader.files import rejects
from loader.load.batch import load, retry
from loader.load.counts import Counts, Loaded
from loader.load.database import Connection
from tests.load.lines import EVENT, as_owner, chunk, event, metric, rejected, rows


def test_lines_are_rows_and_the_ledger_counts_them(connection: Connection, tmp_path: Path) -> None:
    tally = load(connection, [chunk(event(1), metric(1), event(2), event(1), b"{broken")], tmp_path)
    assert tally == Loaded(Counts(events=2, metrics=1, duplicates=1, rejected=1), bytes=tally.bytes)
    ledger = "SELECT file, byte_offset, lines, events, metrics, duplicates, rejected FROM analytics_loads"
    assert rows(connection, ledger) == [("s.ndjson", 0, 5, 2, 1, 1, 1)]
    assert rejected(tmp_path) == [("s.ndjson", 5, "invalid_json")]
    (file,) = (tmp_path / "rejected").iterdir()
    assert re.fullmatch(r"s-0-[0-9a-f]{12}\.ndjson", file.name)


BROKEN = {
    "not_finite": metric(1).replace(b'"value":1', b'"value":NaN'),
    "missing_field": event(1).replace(b'"user_id"', b'"user"').replace(b'"user":', b'"session_id":'),
    "naive_timestamp": event(2, timestamp="2026-01-20T12:00:00"),
    "nul_character": event(3, metadata={"a": "x\0y"}),
    "invalid_name": event(4, event_type="x" * 200),
    "postgres_22003": metric(2).replace(b'"value":1', b'"value":1e200000'),
}


def test_each_kind_of_broken_line_has_its_own_reason_and_none_stops_the_load(
    connection: Connection, tmp_path: Path
) -> None:
    good = [event(n) for n in range(100, 150)]
    lines = [line for pair in zip(good, BROKEN.values(), strict=False) for line in pair] + good[len(BROKEN) :]
    tally = load(connection, [chunk(*lines)], tmp_path)
    assert (tally.counts.events, tally.counts.rejected) == (50, len(BROKEN))
    codes = [code for _, _, code in rejected(tmp_path)]
    assert sorted(codes) == sorted(BROKEN)
    reasons = {each.reason for path in rejects.files(tmp_path) for each in rejects.read(path)}
    assert len(reasons) == len(BROKEN)


def test_loading_again_renamed_or_concatenated_changes_nothing(
    connection: Connection, tmp_path: Path
) -> None:
    one, two = [event(n) for n in range(50)], [event(n) for n in range(50, 90)] + [metric(1)]
    load(connection, [chunk(*one), chunk(*two)], tmp_path)
    everything = (
        "SELECT e::text FROM analytics_events e UNION ALL SELECT m::text FROM analytics_metrics m ORDER BY 1"
    )
    before = rows(connection, everything)
    assert load(connection, [chunk(*one), chunk(*two, file="renamed.ndjson")], tmp_path).known == 91
    again = load(connection, [chunk(*one, *two)], tmp_path)
    assert again.counts == Counts(duplicates=91)
    assert load(connection, [chunk(*two, *one), chunk(*two, *one)], tmp_path).known == 91
    assert rows(connection, everything) == before


def test_two_loaders_at_once_load_each_row_once(connection: Connection, tmp_path: Path) -> None:
    batches = [[chunk(*[event(n * 40 + i) for i in range(40)])] for n in range(30)]
    tallies: list[Loaded] = []

    def work(order: int) -> None:
        with psycopg.connect(connection.info.dsn) as own:
            for batch in batches[::order]:
                while True:
                    try:
                        tallies.append(load(own, batch, tmp_path))
                        break
                    except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                        continue

    threads = [threading.Thread(target=work, args=(order,)) for order in (1, -1, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(tallies, Loaded())
    assert (total.counts.events, total.known, total.counts.duplicates) == (1200, 2400, 0)
    assert rows(connection, "SELECT count(*), sum(events) FROM analytics_loads") == [(30, 1200)]


@pytest.fixture
def strict_users(connection: Connection) -> Connection:
    """Create a table of users, referenced by events, with one user."""
    as_owner(connection, "CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY)")
    as_owner(connection, "ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES auth.users (id)")
    as_owner(connection, f"INSERT INTO auth.users VALUES ('{EVENT['user_id']}')")
    return connection


@pytest.mark.parametrize("strangers", [{0}, {99}, {3, 50, 51}, set(range(100))])
def test_rows_that_a_constraint_refuses_are_isolated(
    strict_users: Connection, tmp_path: Path, strangers: set[int]
) -> None:
    stranger = "0190163d-8694-739b-aea5-00000000dead"
    lines = [event(n, **({"user_id": stranger} if n in strangers else {})) for n in range(100)]
    tally = load(strict_users, [chunk(*lines)], tmp_path)
    assert (tally.counts.events, tally.counts.rejected) == (100 - len(strangers), len(strangers))
    assert rejected(tmp_path) == [("s.ndjson", n + 1, "postgres_23503") for n in sorted(strangers)]


def test_retry_loads_what_became_loadable_and_leaves_the_rest(
    strict_users: Connection, tmp_path: Path
) -> None:
    stranger = "0190163d-8694-739b-aea5-00000000dead"
    load(
        strict_users,
        [chunk(event(1), event(2, user_id=stranger), b"{broken", event(4, user_id=stranger))],
        tmp_path,
    )
    (path,) = rejects.files(tmp_path)
    assert retry(strict_users, path).counts.rejected == 3
    as_owner(strict_users, f"INSERT INTO auth.users VALUES ('{stranger}')")
    tally = retry(strict_users, path)
    assert (tally.counts.events, tally.counts.rejected) == (2, 1)
    assert rejected(tmp_path) == [("s.ndjson", 3, "invalid_json")]
    assert rows(strict_users, "SELECT sum(events), sum(rejected), sum(lines) FROM analytics_loads") == [
        (3, 3, 6)
    ]


def test_retry_removes_a_file_of_which_nothing_is_left(strict_users: Connection, tmp_path: Path) -> None:
    stranger = "0190163d-8694-739b-aea5-00000000dead"
    load(strict_users, [chunk(event(2, user_id=stranger))], tmp_path)
    (path,) = rejects.files(tmp_path)
    as_owner(strict_users, f"INSERT INTO auth.users VALUES ('{stranger}')")
    retry(strict_users, path)
    assert rejects.files(tmp_path) == []


def test_an_event_of_another_payload_is_a_reject_that_names_both(
    connection: Connection, tmp_path: Path
) -> None:
    load(connection, [chunk(event(1, metadata={"title": "first"}))], tmp_path)
    tally = load(connection, [chunk(event(1, metadata={"title": "second"}), file="t.ndjson")], tmp_path)
    assert (tally.counts.rejected, tally.counts.duplicates) == (1, 0)
    (path,) = rejects.files(tmp_path)
    (reject,) = rejects.read(path)
    assert reject.code == "collision" and "first" in reject.reason and b"second" in reject.raw


def test_rejects_of_other_lines_under_the_same_name_are_kept(connection: Connection, tmp_path: Path) -> None:
    for broken in (b"{one", b"{two", b"{two"):
        load(connection, [chunk(broken, file="same.ndjson")], tmp_path)
    kept = [each.raw for path in rejects.files(tmp_path) for each in rejects.read(path)]
    assert sorted(kept) == [b"{one", b"{two"]


def test_an_interrupted_load_writes_its_rejects_again_and_leaves_none_behind(
    connection: Connection, tmp_path: Path
) -> None:
    lines = chunk(event(1), event(2), b"{broken")
    rejects.write(
        tmp_path,
        lines,
        [rejects.Rejected("s.ndjson", n, "x", "y", list(lines.lines())[n - 1]) for n in (2, 3)],
    )
    load(connection, [lines], tmp_path)
    assert rejected(tmp_path) == [("s.ndjson", 3, "invalid_json")]


def test_a_disk_that_cant_take_rejects_rolls_the_load_back(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "rejected").write_text("in the way")
    with pytest.raises(OSError):
        load(connection, [chunk(event(1), b"{broken")], tmp_path)
    assert rows(connection, "SELECT count(*) FROM analytics_events") == [(0,)]
