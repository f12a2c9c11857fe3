"""A row that Postgres refuses or does not store is rejected and counted, whatever the cause."""

from __future__ import annotations

import time
from pathlib import Path

import psycopg
import pytest

from loader.files import rejects
from loader.load.batch import load
from loader.load.database import Connection
from tests.load.lines import EVENT, as_owner, chunk, event, metric, number, rejected, rows, segment
from tests.processes import Cli, eventually, slowness
from tests.servers import DROP_QUESTIONS

EVENTS = "SELECT count(*) FROM analytics_events"
STRANGER = "0190163d-8694-739b-aea5-00000000dead"
WAYS = pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])


def trigger(body: str, *, when: str = "BEFORE", table: str = "analytics_events") -> str:
    """Create a trigger for each row, named `picky`."""
    return (
        f"CREATE FUNCTION picky() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$; "
        f"CREATE TRIGGER picky {when} INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION picky()"
    )


def raising(state: str) -> str:
    return trigger(
        "IF NEW.event_type = 'cursed' THEN "
        f"RAISE 'not this one' USING ERRCODE = '{state}'; END IF; RETURN NEW;"
    )


def reasons(spool: Path) -> set[str]:
    return {each.reason for path in rejects.files(spool) for each in rejects.read(path)}


# ---- rows that are not kept -------------------------------------------------------------------------

DROPPING = {
    "a trigger": (
        trigger("IF NEW.event_type = 'cursed' THEN RETURN NULL; END IF; RETURN NEW;"),
        "trigger picky",
    ),
    "a trigger that deletes": (
        trigger(
            "IF NEW.event_type = 'cursed' THEN "
            "DELETE FROM analytics_events WHERE id = NEW.id; END IF; RETURN NULL;",
            when="AFTER",
        ).replace("plpgsql AS", "plpgsql SECURITY DEFINER AS"),
        "trigger picky",
    ),
}


@WAYS
@pytest.mark.parametrize(("setup", "cause"), DROPPING.values(), ids=DROPPING.keys())
def test_a_row_that_the_table_does_not_keep_is_rejected_with_what_may_be_the_cause(
    connection: Connection, tmp_path: Path, setup: str, cause: str, duplicates: float
) -> None:
    as_owner(connection, setup)
    lost = {3, 40}
    lines = [event(n, **({"event_type": "cursed"} if n in lost else {})) for n in range(60)]
    tally = load(connection, [chunk(*lines, lines[3], lines[5], metric(1))], tmp_path, duplicates)
    assert (tally.counts.events, tally.counts.metrics) == (58, 1)
    assert (tally.counts.duplicates, tally.counts.rejected) == (1, 3)
    assert {(line, code) for _, line, code in rejected(tmp_path)} == {
        (4, "not_stored"), (41, "not_stored"), (61, "not_stored"),
    }  # fmt: skip
    assert all(cause in reason for reason in reasons(tmp_path))
    assert number(connection, EVENTS) == 58
    assert rows(connection, "SELECT events, duplicates, rejected FROM analytics_loads") == [(58, 1, 3)]


@WAYS
def test_a_rule_that_drops_rows_is_no_reason_to_retry_forever(
    connection: Connection, tmp_path: Path, duplicates: float
) -> None:
    as_owner(
        connection,
        "CREATE RULE picky AS ON INSERT TO analytics_events "
        "WHERE NEW.event_type = 'cursed' DO INSTEAD NOTHING",
    )
    lines = [event(1), event(2, event_type="cursed"), event(1), event(2, event_type="cursed")]
    tally = load(connection, [chunk(*lines)], tmp_path, duplicates)
    assert tally.counts.events == number(connection, EVENTS)
    assert tally.counts.events + tally.counts.duplicates + tally.counts.rejected == 4
    assert all("rule picky" in reason for reason in reasons(tmp_path))


def test_a_trigger_of_a_partition_is_named(connection: Connection, tmp_path: Path) -> None:
    as_owner(
        connection,
        "ALTER TABLE analytics_metrics RENAME TO old_metrics; "
        "CREATE TABLE analytics_metrics (LIKE old_metrics INCLUDING DEFAULTS, PRIMARY KEY (id)) "
        "PARTITION BY HASH (id); "
        "CREATE TABLE part PARTITION OF analytics_metrics FOR VALUES WITH (MODULUS 1, REMAINDER 0); "
        "GRANT SELECT, INSERT ON analytics_metrics TO analytics_loader; "
        + trigger("RETURN NULL;", table="part"),
    )
    tally = load(connection, [chunk(metric(1), metric(1), event(1))], tmp_path)
    assert (tally.counts.events, tally.counts.metrics, tally.counts.rejected) == (1, 0, 2)
    assert all("trigger picky" in reason for reason in reasons(tmp_path))


def test_a_trigger_that_keeps_every_row_costs_no_reject(connection: Connection, tmp_path: Path) -> None:
    as_owner(connection, trigger("NEW.metadata := NEW.metadata || '{\"seen\": true}'; RETURN NEW;"))
    for duplicates in (0.0, 0.1, 1.0):
        tally = load(connection, [chunk(*map(event, range(50)))], tmp_path, duplicates)
        assert (tally.counts.events, tally.counts.rejected) == (50, 0)
        as_owner(connection, "TRUNCATE analytics_events, analytics_loads")


def test_a_ledger_that_does_not_keep_its_rows_is_reported(connection: Connection, tmp_path: Path) -> None:
    as_owner(connection, trigger("RETURN NULL;", table="analytics_loads"))
    with pytest.raises(Exception, match="analytics_loads does not store its rows: remove its trigger picky"):
        load(connection, [chunk(event(1))], tmp_path)
    assert number(connection, EVENTS) == 0


def test_a_ledger_that_keeps_some_of_its_rows_holds_up_nothing_else(
    cli: Cli, one_connection: Connection
) -> None:
    some = "IF NEW.file LIKE '%-000001.ndjson' THEN RETURN NULL; END IF; RETURN NEW;"
    one_connection.execute(trigger(some, table="analytics_loads").encode())
    one_connection.commit()
    first = segment(cli.spool, 1, *[event(n, metadata={"big": "x" * 1000}) for n in range(5000)])
    with cli.daemon("--workers", "1"):
        for n in range(2, 5):
            segment(cli.spool, n, event(10_000 + n))
        eventually(lambda: not list(cli.spool.glob("*-00000[2-4].ndjson")))
        assert first.exists()
        assert number(one_connection, EVENTS) == 3
        one_connection.execute("DROP TRIGGER picky ON analytics_loads")
        one_connection.commit()
        eventually(lambda: not first.exists())
    assert number(one_connection, EVENTS) == 5003


def test_a_command_ends_with_the_reason_if_the_ledger_keeps_no_rows(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute(trigger("RETURN NULL;", table="analytics_loads").encode())
    one_connection.commit()
    segment(cli.spool, 1, event(1))
    begun = time.monotonic()
    assert "remove its trigger picky" in cli("run", "--once", code=1)
    assert time.monotonic() - begun < 30 * slowness()


# ---- rows that are refused --------------------------------------------------------------------------

STATES = [
    "42501", "21000", "ZZ999", "0A000", "XX000", "25006", "42P01", "55000", "F0000", "02000", "P0004",
    "40001", "40P01", "53100", "53300", "57014", "57P01", "58030", "08006", "55P03", "23505", "23503",
]  # fmt: skip


@WAYS
@pytest.mark.parametrize("state", STATES)
def test_a_row_that_a_trigger_refuses_is_rejected_whatever_the_sqlstate(
    one_connection: Connection, tmp_path: Path, state: str, duplicates: float
) -> None:
    one_connection.execute(raising(state).encode())
    one_connection.commit()
    lines = [event(n, **({"event_type": "cursed"} if n == 3 else {})) for n in range(20)]
    tally = load(one_connection, [chunk(*lines, lines[3], lines[4])], tmp_path, duplicates)
    assert (tally.counts.events, tally.counts.duplicates, tally.counts.rejected) == (19, 1, 2)
    assert {code for _, _, code in rejected(tmp_path)} == {f"postgres_{state}"}


@pytest.mark.parametrize("state", ["42501", "ZZ999", "53100"])
def test_a_configuration_that_refuses_every_row_rejects_none(
    one_connection: Connection, tmp_path: Path, state: str
) -> None:
    one_connection.execute(trigger(f"RAISE 'closed' USING ERRCODE = '{state}';").encode())
    one_connection.commit()
    with pytest.raises(psycopg.Error, match="closed"):
        load(one_connection, [chunk(*map(event, range(20)))], tmp_path)
    assert not rejected(tmp_path)


@WAYS
@pytest.mark.parametrize("state", ["42501", "ZZ999", "55000"])
def test_a_batch_that_is_refused_as_a_whole_is_at_fault_once_other_rows_are_accepted(
    one_connection: Connection, tmp_path: Path, state: str, duplicates: float
) -> None:
    one_connection.execute(raising(state).encode())
    one_connection.commit()
    cursed = chunk(event(1, event_type="cursed"), event(2, event_type="cursed"))
    with pytest.raises(psycopg.Error, match="not this one"):
        load(one_connection, [cursed], tmp_path, duplicates)
    load(one_connection, [chunk(event(3))], tmp_path, duplicates)
    assert load(one_connection, [cursed], tmp_path, duplicates).counts.rejected == 2
    assert number(one_connection, EVENTS) == 1


def test_rows_that_were_stored_before_do_not_blame_those_that_a_configuration_refuses(
    connection: Connection, tmp_path: Path
) -> None:
    load(connection, [chunk(event(1))], tmp_path)
    as_owner(connection, "REVOKE INSERT ON analytics_events FROM analytics_loader")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        load(connection, [chunk(event(2))], tmp_path)
    as_owner(connection, "GRANT INSERT ON analytics_events TO analytics_loader")
    as_owner(connection, trigger("RAISE 'closed' USING ERRCODE = '42501';"))
    with pytest.raises(psycopg.Error, match="closed"):
        load(connection, [chunk(event(2))], tmp_path)
    assert not rejected(tmp_path)


def test_a_permission_that_is_missing_rejects_no_row(connection: Connection, tmp_path: Path) -> None:
    as_owner(connection, "REVOKE INSERT ON analytics_events FROM analytics_loader")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        load(connection, [chunk(event(1), metric(1))], tmp_path)
    assert not rejected(tmp_path)


def test_an_error_that_only_copy_has_leads_to_the_staged_way(connection: Connection, tmp_path: Path) -> None:
    """On Citus each error of a worker in a COPY is an XX000; row-level security is another case."""
    as_owner(
        connection,
        trigger(
            "IF current_query() LIKE 'COPY%' THEN RAISE 'worker' USING ERRCODE = 'XX000'; END IF; RETURN NEW;"
        ),
    )
    tally = load(connection, [chunk(*map(event, range(30)), event(1))], tmp_path)
    assert (tally.counts.events, tally.counts.duplicates, tally.counts.rejected) == (30, 1, 0)


def test_row_level_security_does_not_stop_the_load(connection: Connection, tmp_path: Path) -> None:
    as_owner(
        connection,
        "ALTER TABLE analytics_events ENABLE ROW LEVEL SECURITY; "
        "CREATE POLICY reads ON analytics_events FOR SELECT USING (true); "
        "CREATE POLICY adds ON analytics_events FOR INSERT WITH CHECK (event_type <> 'cursed')",
    )
    lines = [event(n, **({"event_type": "cursed"} if n == 3 else {})) for n in range(20)]
    tally = load(connection, [chunk(*lines, lines[4])], tmp_path)
    assert (tally.counts.events, tally.counts.duplicates, tally.counts.rejected) == (19, 1, 1)


# ---- many of them -----------------------------------------------------------------------------------

MANY = 15_000
HALF = {
    "a foreign key that the loader may look up": (
        "CREATE TABLE people (id UUID PRIMARY KEY); GRANT SELECT ON people TO analytics_loader; "
        f"INSERT INTO people VALUES ('{EVENT['user_id']}'); "
        "ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES people (id)",
        {"user_id": STRANGER}, "23503",
    ),
    "a foreign key": (
        "CREATE TABLE people (id UUID PRIMARY KEY); "
        f"INSERT INTO people VALUES ('{EVENT['user_id']}'); "
        "ALTER TABLE analytics_events ADD FOREIGN KEY (user_id) REFERENCES people (id)",
        {"user_id": STRANGER}, "23503",
    ),
    "a check": (
        "ALTER TABLE analytics_events ADD CHECK (event_type <> 'cursed')", {"event_type": "cursed"}, "23514",
    ),
    "a type": (
        f"DROP VIEW analytics_events_daily; {DROP_QUESTIONS}"
        "ALTER TABLE analytics_events ALTER event_type TYPE varchar(20)",
        {"event_type": "x" * 21}, "22001",
    ),
    "a trigger": (raising("42501"), {"event_type": "cursed"}, "42501"),
}  # fmt: skip


@pytest.mark.parametrize(("setup", "change", "state"), HALF.values(), ids=HALF.keys())
def test_a_batch_half_of_which_is_refused_takes_about_the_time_of_a_good_one(
    connection: Connection, tmp_path: Path, setup: str, change: dict[str, str], state: str
) -> None:
    as_owner(connection, setup)
    good = chunk(*[event(n) for n in range(MANY)])
    half = chunk(*[event(n + MANY, **(change if n % 2 else {})) for n in range(MANY)])
    seconds = []
    for batch in (good, half):
        begun = time.perf_counter()
        tally = load(connection, [batch], tmp_path)
        seconds.append(time.perf_counter() - begun)
    assert (tally.counts.events, tally.counts.rejected) == (MANY / 2, MANY / 2)
    assert {code for _, _, code in rejected(tmp_path)} == {f"postgres_{state}"}
    print(f"SECONDS {seconds}")
    assert seconds[1] < 10 * seconds[0] + 2
    size = number(connection, "SELECT pg_relation_size('analytics_events')")
    as_owner(connection, "CREATE TABLE lean AS SELECT * FROM analytics_events")
    assert size < 3 * number(connection, "SELECT pg_relation_size('lean')")
