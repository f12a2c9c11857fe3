"""What only Postgres can find: the offending rows are rejected with its own words, and no other row is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from loader.files import rejects
from loader.load.batch import load
from loader.load.database import Connection
from tests.load.lines import EVENT, as_owner, chunk, event, metric, rejected

STRANGER = "0190163d-8694-739b-aea5-00000000dead"
USERS = f"""
    CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY);
    INSERT INTO auth.users VALUES ('{EVENT["user_id"]}');
    ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES auth.users (id)
"""
DEFERRED = USERS + " DEFERRABLE INITIALLY DEFERRED"
CHECKED = "ALTER TABLE analytics_events ADD CONSTRAINT no_drafts CHECK (metadata->>'title' <> 'draft')"
UNIQUE = "CREATE UNIQUE INDEX one_title ON analytics_events ((metadata->>'title')) WHERE metadata ? 'once'"
RAISING = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.event_type = 'cursed' THEN RAISE 'this is not for us'; END IF; RETURN NEW; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION refuse()
"""
DIGITS: dict[str, Any] = {"metadata": {"n": "digits"}}
POISON = {
    "a number of 200,000 digits": ("", DIGITS, "22003", "overflow"),
    "a foreign key": (USERS, {"user_id": STRANGER}, "23503", "violates foreign key constraint"),
    "a deferred foreign key": (DEFERRED, {"user_id": STRANGER}, "23503", "violates foreign key constraint"),
    "a check that someone added": (CHECKED, {"metadata": {"title": "draft"}}, "23514", "no_drafts"),
    "a trigger that raises": (RAISING, {"event_type": "cursed"}, "P0001", "not for us"),
}


def poisoned(number: int, change: dict[str, Any]) -> bytes:
    return event(number, **change).replace(b'"digits"', b"9" * 200_000)


@pytest.mark.parametrize(("setup", "change", "state", "words"), POISON.values(), ids=POISON.keys())
def test_only_the_offending_rows_are_rejected_with_postgres_own_words(
    connection: Connection, tmp_path: Path, setup: str, change: dict[str, Any], state: str, words: str
) -> None:
    if setup:
        as_owner(connection, setup)
    offending = {3, 40, 41}
    lines = [poisoned(n, change) if n in offending else event(n) for n in range(60)]
    tally = load(connection, [chunk(*lines, metric(1))], tmp_path)
    assert (tally.counts.events, tally.counts.metrics, tally.counts.rejected) == (57, 1, 3)
    assert rejected(tmp_path) == [("s.ndjson", n + 1, f"postgres_{state}") for n in sorted(offending)]
    assert all(words in each.reason for path in rejects.files(tmp_path) for each in rejects.read(path))


def test_another_unique_index_is_a_reason_to_reject_not_a_duplicate(
    connection: Connection, tmp_path: Path
) -> None:
    try:
        as_owner(connection, UNIQUE)
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("a unique index of a partitioned table includes its key")
    same = {"title": "same", "once": True}
    lines = [event(1, metadata=same), event(2), event(3, metadata=same), event(2)]
    for duplicates in (0.0, 0.1, 1.0):
        tally = load(connection, [chunk(*lines, file=f"{duplicates}")], tmp_path, duplicates)
        assert tally.counts.rejected == 1
        as_owner(connection, "TRUNCATE analytics_events, analytics_loads")
    assert {code for _, _, code in rejected(tmp_path)} == {"postgres_23505"}


@pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])
def test_the_same_id_with_another_payload_is_a_collision_wherever_the_other_one_is(
    connection: Connection, tmp_path: Path, duplicates: float
) -> None:
    """In the table, in another chunk of the batch, above in the same chunk; an equal one is a duplicate."""
    load(connection, [chunk(event(1, metadata={"is": "stored"}), metric(1), file="before")], tmp_path)
    batch = [
        chunk(event(2, metadata={"is": "above"}), event(3), metric(2), file="one.ndjson"),
        chunk(
            event(1, metadata={"is": "other"}), event(1, metadata={"is": "stored"}),
            event(2, metadata={"is": "other"}), event(2, metadata={"is":   "above"}),
            event(4), event(4, metadata={"is": "twice"}), event(4),
            metric(1), metric(1, value=9), metric(2, labels={"is": "other"}), metric(3),
            file="two.ndjson",
        ),
    ]  # fmt: skip
    tally = load(connection, batch, tmp_path, duplicates)
    assert (tally.counts.events, tally.counts.metrics) == (3, 2)
    assert (tally.counts.duplicates, tally.counts.rejected) == (4, 5)
    reasons = {each.line: each.reason for path in rejects.files(tmp_path) for each in rejects.read(path)}
    assert sorted(reasons) == [1, 3, 6, 9, 10]
    assert {each.code for path in rejects.files(tmp_path) for each in rejects.read(path)} == {"collision"}
    for line, stored in ((1, "stored"), (3, "above"), (6, '""a"": 1')):
        assert stored in reasons[line]
