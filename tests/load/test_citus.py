"""Tables that Citus distributes: a wire and a catalog stand in for it, see tests/citus.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.errors import LoaderError
from loader.load import database, partitions, rollups
from loader.load.batch import load
from loader.load.counts import Counts
from loader.load.database import Connection
from loader.load.schema import apply_schema
from loader.operate import doctor, erase, finding, prune
from loader.operate.places import Places
from loader.see import export, questions
from loader.see.period import period
from tests import citus
from tests.citus import Wire
from tests.load.lines import chunk, event, ledger_agrees, metric, rejected, rows
from tests.servers import ROLE
from tests.servers import database as fresh_database

CHECK = "ALTER TABLE analytics_events ADD CONSTRAINT even CHECK ((metadata->>'n') IS DISTINCT FROM '1')"
BROKEN_WORKER = (
    "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "PERFORM array_in('{1}', 0, -1); RETURN NEW; END $$; "  # "cache lookup failed for type 0", an XX000
    "CREATE TRIGGER broken BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION broken()"
)


@pytest.fixture(scope="module")
def module_owner(servers: object, one_server: str) -> Iterator[Connection]:
    with fresh_database(one_server, "template1") as dsn, psycopg.connect(dsn) as connection:
        citus.install(connection)
        apply_schema(connection, layout="citus", width="month", role=ROLE)
        partitions.make(connection)
        yield connection


@pytest.fixture
def owner(module_owner: Connection) -> Iterator[Connection]:
    """The owner's connection to empty tables, which the server reports as distributed."""
    with module_owner.transaction():
        module_owner.execute(
            "TRUNCATE analytics_events, analytics_metrics, analytics_loads, analytics_touched, analytics_sealed, "
            "analytics_hourly_events, analytics_hourly_metrics, analytics_user_days, analytics_erasures"
        )
        module_owner.execute("DELETE FROM analytics_settings WHERE name LIKE '%_kept_since'")
    yield module_owner
    module_owner.rollback()
    with module_owner.transaction():
        module_owner.execute("ALTER TABLE analytics_events DROP CONSTRAINT IF EXISTS even")
        module_owner.execute("DROP FUNCTION IF EXISTS broken() CASCADE")


@pytest.fixture
def wire(owner: Connection) -> Iterator[Wire]:
    with Wire.to(owner.info.dsn) as wire:
        yield wire
        assert wire.refused() == []


@pytest.fixture
def loader(wire: Wire) -> Iterator[Connection]:
    with database.connect(make_conninfo(wire.dsn, user=ROLE)) as connection:
        yield connection


def owner_does(owner: Connection, statement: str) -> None:
    with owner.transaction():
        owner.execute(statement.encode())


def test_both_tables_are_distributed_by_their_key_and_colocated(owner: Connection) -> None:
    found = rows(owner, "SELECT logicalrelid::text, key, colocated FROM pg_dist_partition ORDER BY 1")
    assert found == [
        ("analytics_events", "event_id", "default"), ("analytics_metrics", "id", "analytics_events")
    ]  # fmt: skip
    assert len(rows(owner, "SELECT * FROM analytics_partitions('metrics')")) > 3
    applied = apply_schema(owner)
    assert (applied.layout, applied.foreign_keys, applied.warnings) == ("citus", "off", [])


def test_no_function_depends_on_a_distributed_table(owner: Connection) -> None:
    """Citus would treat the table as dependent on the function, and refuse to attach partitions."""
    depending = (
        "SELECT objid::regproc FROM pg_depend WHERE classid = 'pg_proc'::regclass "
        "AND refobjid IN ('analytics_events'::regclass, 'analytics_metrics'::regclass)"
    )
    assert rows(owner, depending) == []
    assert rows(owner, "SELECT count(*) > 20 FROM pg_proc WHERE proname LIKE 'analytics%'") == [(True,)]
    refused = r"OFFSET 0|RECURSIVE \w+ AS \([^;]*public\.analytics_(events|metrics)"
    bodies = dict(rows(owner, "SELECT proname, prosrc FROM pg_proc WHERE proname LIKE 'analytics%'"))
    assert [name for name, body in bodies.items() if re.search(refused, body) and "%1$I" not in body] == []


def test_tables_that_were_distributed_by_hand_are_found(one_server: str) -> None:
    with fresh_database(one_server, "template1") as dsn, psycopg.connect(dsn) as connection:
        citus.install(connection)
        apply_schema(connection, layout="partitioned")
        connection.execute("SELECT create_distributed_table('analytics_events', 'event_id')")
        assert apply_schema(connection).layout == "citus"
        assert apply_schema(connection, layout="citus").foreign_keys == "off"


def test_foreign_keys_and_servers_without_citus_are_refused(owner: Connection, one_server: str) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="Citus allows no foreign keys"):
        apply_schema(owner, foreign_keys=True)
    with pytest.raises(psycopg.errors.RaiseException, match='layout "citus" cannot become "partitioned"'):
        apply_schema(owner, layout="partitioned")
    with fresh_database(one_server, "template1") as dsn, psycopg.connect(dsn) as plain:
        with pytest.raises(psycopg.errors.RaiseException, match="not a coordinator of Citus"):
            apply_schema(plain, layout="citus")
        plain.rollback()


def test_duplicates_and_collisions_are_found_although_copy_reports_an_internal_error(
    wire: Wire, loader: Connection, owner: Connection, tmp_path: Path
) -> None:
    first = [event(n) for n in range(50)] + [metric(n) for n in range(50)]
    assert load(loader, [chunk(*first)], tmp_path).counts == Counts(events=50, metrics=50)
    assert load(loader, [chunk(*first)], tmp_path).known == 100
    collisions = [event(n, event_type="other") for n in range(50, 60)]
    load(loader, [chunk(*(event(n) for n in range(50, 60)))], tmp_path)
    mixed = [*first, *collisions, event(60), metric(60), event(60)]
    for duplicates in (0.0, 0.1, 1.0):  # each way
        again = load(loader, [chunk(*mixed, metric(100 + int(duplicates * 10)))], tmp_path, duplicates)
        assert again.counts.rejected == 10
        assert again.counts.lines == len(mixed) + 1
    assert wire.internal_errors == 1
    ledger_agrees(owner, tmp_path)


def test_the_workers_get_the_settings_of_a_transaction(
    wire: Wire, loader: Connection, tmp_path: Path
) -> None:
    """A statement_timeout of the role on a worker would otherwise end each COPY."""
    load(loader, [chunk(event(1))], tmp_path)
    (settings, *_) = [text for text in wire.statements if b"citus.propagate_set_commands = 'local'" in text]
    assert settings.index(b"propagate_set_commands") < settings.index(b"statement_timeout = 0")


def test_rows_that_a_worker_refuses_are_rejected_and_the_others_are_loaded(
    wire: Wire, loader: Connection, owner: Connection, tmp_path: Path
) -> None:
    """Citus does not report the name of a constraint, by which a missing partition is recognized otherwise."""
    owner_does(owner, CHECK)
    lines = [event(n, metadata={"n": n % 2}) for n in range(20)]
    too_large = metric(2).replace(b'"value":1', b'"value":1e200000')
    loaded = load(loader, [chunk(*lines, metric(1), too_large)], tmp_path)
    assert loaded.counts == Counts(events=10, metrics=1, rejected=11)
    codes = sorted(code for _, _, code in rejected(tmp_path))
    assert codes == ["postgres_22003"] + ["postgres_23514"] * 10
    assert wire.internal_errors >= 1
    ledger_agrees(owner, tmp_path)


@pytest.mark.parametrize("duplicates", [0.0, 1.0])
def test_a_worker_that_fails_rejects_nothing(
    loader: Connection, owner: Connection, tmp_path: Path, duplicates: float
) -> None:
    owner_does(owner, BROKEN_WORKER)
    with pytest.raises(database.NodeFailedError, match="a node of Citus failed: cache lookup failed"):
        load(loader, [chunk(event(1), metric(1))], tmp_path, duplicates)
    assert rejected(tmp_path) == []
    assert rows(owner, "SELECT count(*) FROM analytics_loads") == [(0,)]
    owner_does(owner, "DROP TRIGGER broken ON analytics_events")
    assert load(loader, [chunk(event(1), metric(1))], tmp_path).counts == Counts(events=1, metrics=1)


def test_a_check_and_a_worker_that_fails_while_rows_are_inserted_one_by_one(
    loader: Connection, owner: Connection, tmp_path: Path
) -> None:
    """The check leads to the block of PL/pgSQL that rejects what is refused; the outage begins there."""
    owner_does(owner, CHECK)
    owner_does(owner, BROKEN_WORKER)
    owner_does(owner, "ALTER FUNCTION broken() RENAME TO always")
    one_by_one = (
        "CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS $$ DECLARE stack text; BEGIN "
        "IF NEW.metadata->>'n' = '1' THEN RETURN NEW; END IF; "
        "GET DIAGNOSTICS stack = PG_CONTEXT; IF stack ~ 'loader_each_row' THEN "
        "PERFORM array_in('{1}', 0, -1); END IF; RETURN NEW; END $$; "
        "DROP FUNCTION always CASCADE; "
        "CREATE TRIGGER broken BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION broken()"
    )
    owner_does(owner, one_by_one)
    with pytest.raises(database.NodeFailedError):
        load(loader, [chunk(*(event(n, metadata={"n": n % 2}) for n in range(10)))], tmp_path)
    assert rejected(tmp_path) == []
    assert rows(owner, "SELECT count(*) FROM analytics_loads") == [(0,)]


def test_a_refresh_waits_for_transactions_that_the_workers_have_not_committed(
    loader: Connection, owner: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are invisible, and their marks are not."""
    load(loader, [chunk(event(1))], tmp_path)
    monkeypatch.setattr(rollups, "WORKERS_SECONDS", 0.1)
    with loader.transaction():
        loader.execute("SET citus.stub_prepared = 'citus_0_1_2_3'")
    with pytest.raises(psycopg.errors.SerializationFailure, match="in doubt"):
        rollups.refresh(loader)
    assert rollups.touched(owner).hours == 1
    with loader.transaction():
        loader.execute("RESET citus.stub_prepared")
    assert rollups.refresh(loader) > 0
    assert rollups.touched(owner).hours == 0


def test_the_doctor_reports_workers_that_do_not_answer_or_keep_rows_invisible(
    wire: Wire, owner: Connection
) -> None:
    found = {
        finding.verdict: finding.finding
        for finding in doctor.examine(None, wire.dsn, None)
        if finding.check == "workers"
    }
    assert found == {
        finding.Verdict.FAILED: "w1:5432 does not answer: refused",
        finding.Verdict.WARNING: "w2:5432 has 3 prepared transactions, whose rows are not visible yet",
    }


def test_the_doctor_asks_the_workers_for_sizes(wire: Wire, owner: Connection) -> None:
    found = [each for each in doctor.examine(None, wire.dsn, None) if each.check == "ids"]
    assert [each.verdict for each in found] == [finding.Verdict.WARNING] * 2


def test_the_questions_use_nothing_that_citus_refuses(wire: Wire, owner: Connection) -> None:
    with questions.reading(wire.dsn) as connection:
        (sentence,) = questions.unknown_types(connection, ["memory_postd"])
        questions.ask(connection, "trend", period("7d", "now", "UTC"), types=None, bucket="day", top=None)
    assert "memory_postd" in sentence


def test_an_export_uses_nothing_that_citus_refuses_or_renames(
    wire: Wire, owner: Connection, loader: Connection, tmp_path: Path
) -> None:
    load(loader, [chunk(event(1), metric(1))], tmp_path)
    everything = export.Range(None, None)
    with questions.reading(make_conninfo(wire.dsn, user=ROLE)) as connection:
        for name, source in export.SOURCES.items():
            exporting = export.Export(source, "ndjson")
            exporting.to_file(connection, everything, tmp_path / f"{name}.ndjson")
            exporting.by_day(connection, everything, tmp_path / name, UTC)
            assert exporting.exported.rows == 2
    lines = [(tmp_path / f"{name}.ndjson").read_bytes() for name in export.SOURCES]
    assert load(loader, [chunk(*lines)], tmp_path).known == 0
    assert rows(owner, "SELECT sum(duplicates)::int FROM analytics_loads") == [(2,)]


def test_rows_are_pruned_in_batches_and_no_partition_is_dropped(
    wire: Wire, owner: Connection, loader: Connection, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    old = (now - timedelta(days=40)).isoformat()
    lines = [event(n, timestamp=old) for n in range(20)] + [metric(n, timestamp=old) for n in range(10)]
    kept = (event(90, timestamp=now.isoformat()), metric(90, timestamp=now.isoformat()))
    load(loader, [chunk(*lines, *kept)], tmp_path)
    partitions_before = rows(owner, "SELECT count(*) FROM analytics_partitions('events')")
    with database.connect(wire.dsn) as connection:
        pruning = prune.Rows(connection, timedelta(days=30), Event())
        counted = pruning.count()
        pruned = pruning.delete(lambda _: None)
        with pytest.raises(LoaderError, match="cannot export what is pruned on Citus"):
            prune.Rows(connection, timedelta(days=30), Event(), lambda *_: 0).delete(lambda _: None)
    assert (counted.events, counted.metrics) == (pruned.events, pruned.metrics) == (20, 10)
    assert rows(owner, "SELECT sum(events)::int FROM analytics_hourly_events") == [(20,)]
    assert rows(owner, "SELECT sum(records)::int FROM analytics_hourly_metrics") == [(10,)]
    assert rows(owner, "SELECT count(*) FROM analytics_events") == [(1,)]
    assert rows(owner, "SELECT count(*) FROM analytics_partitions('events')") == partitions_before
    assert load(loader, [chunk(*reversed(lines))], tmp_path).counts == Counts(expired=30)
    (body,) = rows(owner, "SELECT prosrc FROM pg_proc WHERE proname = 'analytics_drop_partition'")
    assert "on Citus" in body[0]


def test_pruning_waits_for_rows_that_the_workers_have_not_committed(owner: Connection) -> None:
    prune_hour = "SELECT analytics_prune_hour('events', '2026-01-01 00:00+00')"
    owner.execute("SET citus.stub_prepared = 'citus_0_1_2_3'")
    with pytest.raises(psycopg.errors.SerializationFailure, match="in doubt"):
        owner.execute(prune_hour)
    owner.rollback()
    assert rows(owner, prune_hour) == [(0,)]


def test_an_erasure_locks_no_rows_of_several_shards(
    wire: Wire, owner: Connection, loader: Connection, tmp_path: Path
) -> None:
    user = UUID("0190163d-0000-739b-aea5-000000000042")
    own, mention = event(1, user_id=str(user)), event(2, metadata={"friend": str(user)})
    load(loader, [chunk(own, mention, event(3), metric(1, labels={"of": str(user)}))], tmp_path)
    with database.connect(wire.dsn) as connection:
        erasure = erase.Erasure(connection, Places(tmp_path, None, []), [("user", user)])
        erased = erasure.run()
    assert (erased.events, erased.mentions) == (1, 2)
    (found,) = rows(owner, "SELECT metadata->>'friend' FROM analytics_events WHERE metadata ? 'friend'")
    assert found == (str(UUID(int=0)),)
