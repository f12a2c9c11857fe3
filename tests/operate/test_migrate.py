"""`loader migrate`: plain tables become partitions under a daemon and readers, also if it is killed at each step."""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import schema
from loader.load.database import Connection
from loader.operate import migrate
from spool.ids import uuid7
from tests.load.lines import event, metric, number, rows, segment, wait_for_events
from tests.processes import HANGS_AFTER, LOADER, Cli, slowness
from tests.servers import ROLE, database

FILL = """
    INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id)
    SELECT CASE WHEN n % 100 = 0 THEN gen_random_uuid() ELSE overlay(analytics_id_at(now() - n * interval '1 second')::text
        PLACING '7' || substr(gen_random_uuid()::text, 16) FROM 15)::uuid END,
        'kind_' || n % 10, now() - n * interval '1 second', gen_random_uuid(), gen_random_uuid()
    FROM generate_series(1, {0}) AS n;
    INSERT INTO analytics_metrics (id, metric_name, metric_type, value, timestamp)
    SELECT event_id, 'hits', 'counter', 1, timestamp FROM analytics_events
"""
LAYOUT = "SELECT value FROM analytics_settings WHERE name = 'layout'"
FILES = "SELECT relname, pg_relation_filenode(oid) FROM pg_class WHERE relname ~ '^analytics_(events|metrics)' AND relkind IN ('r', 'i')"
SLOWEST = 0.5
"""Seconds that a read may take on free processors."""


@pytest.fixture
def plain(one_server: str) -> Iterator[Connection]:
    """The owner's connection to a database with plain tables."""
    with database(one_server, template="plain") as dsn, psycopg.connect(dsn) as connection:
        yield connection


@pytest.fixture
def owner(plain: Connection, spool: Path) -> Cli:
    return Cli(spool, plain.info.dsn)


class Migration:
    """`loader migrate` as a process, whose lines are read one by one."""

    def __init__(self, cli: Cli) -> None:
        self.environment = cli.environment | {
            "LOADER_DSN": make_conninfo(cli.dsn, application_name="migration")
        }
        self.process = subprocess.Popen(
            [*LOADER, "migrate", "--to", "partitioned"], env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout.readline, "")

    def until(self, begins: str) -> bool:
        """Read up to the line with this beginning; return False if the process ended without it."""
        return any(line.startswith(begins) for line in self.lines)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def cut_off(self, connection: Connection) -> None:
        """End its server process; the command reports that, in one line."""
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'migration'"
        )
        connection.commit()
        _, errors = self.process.communicate(timeout=HANGS_AFTER)
        assert self.process.returncode in (0, 1, 4) and "Traceback" not in errors, errors

    def done(self) -> str:
        printed, errors = self.process.communicate(timeout=HANGS_AFTER)
        assert self.process.returncode == 0, printed + errors
        return printed


class Traffic:
    """Lines that are emitted: ids of now, some of version 4, and some of a clock that is a week ahead."""

    def __init__(self, spool: Path) -> None:
        self.events: set[str] = set()
        self.metrics: set[str] = set()
        self._spool = spool
        self._number = itertools.count(1)

    def emit(self) -> None:
        now = int(time.time() * 1000)
        ids = [uuid7(now) for _ in range(18)] + [str(uuid.uuid4()), uuid7(now + 7 * 86_400_000)]
        numbers = [uuid7(now) for _ in range(5)] + [str(uuid.uuid4())]
        lines = [event(n, event_id=each) for n, each in enumerate(ids)]
        lines += [metric(n, event_id=each) for n, each in enumerate(numbers)]
        path = segment(self._spool / "..", next(self._number), *lines)
        path.rename(self._spool / path.name)
        self.events.update(ids)
        self.metrics.update(numbers)


class Reads:
    """Counts all rows again and again: none disappears, and no read waits for long."""

    STATEMENTS = (
        "SELECT count(*) FROM analytics_events", "SELECT count(*) FROM analytics_metrics",
        "SELECT sum(events) FROM analytics_events_daily",
    )  # fmt: skip

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.slowest = 0.0
        self.lost: list[tuple[str, int, int]] = []
        self.done = threading.Event()

    def run(self) -> None:
        counts = dict.fromkeys(self.STATEMENTS, 0)
        with psycopg.connect(self._dsn, autocommit=True) as reader:
            reader.execute("SET statement_timeout = 0")
            while not self.done.is_set():
                for statement, before in counts.items():
                    begun = time.monotonic()
                    ((count,),) = reader.execute(statement.encode()).fetchall()
                    self.slowest = max(self.slowest, time.monotonic() - begun)
                    if count < before:
                        self.lost.append((statement, before, count))
                    counts[statement] = count


@contextmanager
def running(*work: Callable[[], object]) -> Iterator[None]:
    """Threads that run until their work has ended."""
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


STEPS = (
    "upgrading the tables", "building the unique index", "the cut is", "checking", "creating analytics_events",
    "creating analytics_metrics", "switching", "switched",
)  # fmt: skip


def killed_at_each_step(cli: Cli, connection: Connection, connections_too: bool) -> None:
    for step, line in enumerate(STEPS):
        for cut_off in (False, True) if connections_too else (bool(step % 2),):
            migration = Migration(cli)
            migration.until(line)  # it has ended if an earlier run did this step
            if cut_off:
                migration.cut_off(connection)
            else:
                migration.kill()


def check_under_load(connection: Connection, cli: Cli, count: int, connections_too: bool) -> None:
    owner = cli.owner()
    connection.execute(FILL.format(count).encode())
    connection.execute("ANALYZE analytics_events, analytics_metrics")
    connection.commit()
    files = dict(rows(connection, FILES))
    traffic, reads = Traffic(cli.spool), Reads(connection.info.dsn)

    def emit() -> None:
        while not reads.done.wait(0.05):  # the interval between sealed segments
            traffic.emit()

    with cli.daemon(), running(emit, reads.run):
        try:
            wait_for_events(connection, count + 100)
            killed_at_each_step(owner, connection, connections_too)
            printed = Migration(owner).done()
        finally:
            reads.done.set()
    assert "the tables are partitioned" in printed
    cli("run", "--once")  # loads segments that waited for the switch and whose retry is not due yet
    assert reads.lost == []
    assert reads.slowest < SLOWEST * slowness() + 0.5 * connections_too, reads.slowest
    for table, key, expected in (("events", "event_id", traffic.events), ("metrics", "id", traffic.metrics)):
        found = rows(
            connection,
            f"SELECT {key}::text FROM analytics_{table} WHERE {key}::text = ANY ('{{{','.join(expected)}}}')",
        )
        assert sorted(each for (each,) in found) == sorted(expected)
        assert number(connection, f"SELECT count(DISTINCT {key}) FROM analytics_{table}") == count + len(
            expected
        )
    assert number(connection, "SELECT sum(rejected) FROM analytics_loads") == 0
    assert_nothing_was_copied(connection, files)


def assert_nothing_was_copied(connection: Connection, before: dict[str, int]) -> None:
    """The tables and the indexes that still exist are in the files in which they were."""
    kept = {name for name in before if name not in ("analytics_events_pkey", "analytics_events_event_id_key")}
    after = set(dict(rows(connection, FILES)).values())
    assert {name for name in kept if before[name] not in after} == set()


@pytest.mark.long
def test_it_can_be_killed_at_each_step_under_a_daemon_and_a_reader(plain: Connection, spool: Path) -> None:
    cli = Cli(spool, make_conninfo(plain.info.dsn, user=ROLE))
    check_under_load(plain, cli, 5_000, connections_too=False)


@pytest.mark.long
def test_it_can_be_killed_at_each_step_with_millions_of_rows(server: str, spool: Path) -> None:
    with database(server, template="plain") as dsn, psycopg.connect(dsn) as connection:
        check_under_load(
            connection, Cli(spool, make_conninfo(dsn, user=ROLE)), 2_000_000, connections_too=True
        )


DEPENDENT = {
    "view mine": "CREATE VIEW mine AS SELECT event_type FROM analytics_events",
    "materialized view kept": "CREATE MATERIALIZED VIEW kept AS SELECT count(*) FROM analytics_metrics",
    "function analytics_mine()": "CREATE FUNCTION analytics_mine() RETURNS bigint BEGIN ATOMIC SELECT count(*) FROM analytics_events; END",
    "function takes(analytics_events)": "CREATE FUNCTION takes(analytics_events) RETURNS int LANGUAGE sql RETURN 1",
    "table has_row": "CREATE TABLE has_row (row analytics_metrics)",
    "trigger noted": "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
    "CREATE TRIGGER noted AFTER INSERT ON analytics_events EXECUTE FUNCTION noted()",
    "constraint refers": "CREATE TABLE child (id uuid CONSTRAINT refers REFERENCES analytics_events (event_id))",
    "rule quiet": "CREATE RULE quiet AS ON DELETE TO analytics_metrics DO ALSO NOTHING",
    "policy visible": "CREATE POLICY visible ON analytics_events USING (true)",
    "publication of table": "CREATE PUBLICATION sent FOR TABLE analytics_events",
    "publication everything of all tables": "CREATE PUBLICATION everything FOR ALL TABLES",
    "table heir": "CREATE TABLE heir () INHERITS (analytics_metrics)",
    "column number is an identity": "ALTER TABLE analytics_events ADD number bigint GENERATED ALWAYS AS IDENTITY",
    "unique index one_each": "CREATE UNIQUE INDEX one_each ON analytics_events (session_id)",
    "constraint later is not valid": "ALTER TABLE analytics_metrics ADD CONSTRAINT later CHECK (value < 10) NOT VALID",
    "analytics_events_plain is needed": "CREATE TABLE analytics_events_plain ()",
}  # fmt: skip


def test_what_depends_on_the_tables_is_listed_and_nothing_is_changed(owner: Cli, plain: Connection) -> None:
    plain.execute("; ".join(DEPENDENT.values()).encode())
    plain.commit()
    before = rows(plain, FILES)
    for arguments in (["--dry-run"], []):
        printed = owner("migrate", "--to", "partitioned", *arguments, code=1)
        assert [what for what in DEPENDENT if what not in printed] == []
    assert rows(plain, FILES) == before


OF_THE_USERS = """
    CREATE SCHEMA auth; CREATE TABLE auth.users (id uuid PRIMARY KEY); CREATE TABLE family_units (id uuid PRIMARY KEY);
    CREATE TABLE sessions (id uuid PRIMARY KEY); CREATE ROLE {role};
    ALTER TABLE analytics_events ADD extra text DEFAULT 'x', ADD number bigserial,
        ADD size int GENERATED ALWAYS AS (length(event_type)) STORED, ADD CONSTRAINT named CHECK (event_type <> ''),
        ADD CONSTRAINT session FOREIGN KEY (session_id) REFERENCES sessions ON DELETE CASCADE;
    CREATE INDEX "Mine USING it" ON analytics_events (lower(event_type)) WHERE session_id IS NULL;
    COMMENT ON TABLE analytics_events IS 'clicks'; COMMENT ON COLUMN analytics_events.extra IS 'more';
    COMMENT ON INDEX "Mine USING it" IS 'fast'; GRANT SELECT, DELETE ON analytics_events TO {role} WITH GRANT OPTION;
    GRANT UPDATE (metadata) ON analytics_events TO {role}
"""
BELONGS = """
    SELECT (SELECT array_agg((attname, format_type(atttypid, atttypmod), attnotnull, attgenerated, pg_get_expr(adbin, adrelid),
            col_description(attrelid, attnum), attacl)::text ORDER BY attname)
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
            WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
        (SELECT array_agg((conname, pg_get_constraintdef(oid), convalidated)::text ORDER BY conname)
            FROM pg_constraint WHERE conrelid = c.oid AND contype IN ('c', 'f')),
        (SELECT array_agg((indexrelid::regclass::text, obj_description(indexrelid))::text ORDER BY indexrelid::regclass::text)
            FROM pg_index WHERE indrelid = c.oid AND NOT indisunique),
        obj_description(c.oid), relowner, pg_get_serial_sequence('analytics_events', 'number'),
        (SELECT array_agg(acl::text ORDER BY acl::text) FROM aclexplode(relacl) AS acl)
    FROM pg_class AS c WHERE oid = 'analytics_events'::regclass
"""


def test_what_belongs_to_the_tables_is_there_afterwards(owner: Cli, plain: Connection) -> None:
    role = f"reads_{uuid.uuid4().hex}"
    plain.execute(FILL.format(1000).encode())
    plain.execute(OF_THE_USERS.format(role=role).encode())
    plain.execute("INSERT INTO auth.users SELECT user_id FROM analytics_events")
    plain.execute("INSERT INTO family_units SELECT family_unit_id FROM analytics_events")
    plain.commit()
    owner("init", "--foreign-keys")
    before, trend = (
        rows(plain, BELONGS),
        "SELECT * FROM analytics_trend(now() - interval '1 day', now() + interval '1 day')",
    )
    answer = [row[1:] for row in rows(plain, trend)]
    owner("migrate", "--to", "partitioned", "--width", "week")
    for was, became in zip(before[0], rows(plain, BELONGS)[0], strict=True):
        assert became == was
    assert [row[1:] for row in rows(plain, trend)] == answer
    assert rows(plain, LAYOUT) == [("partitioned",)]
    bounds = rows(
        plain,
        "SELECT low, high FROM analytics_partitions('events') WHERE NOT is_default ORDER BY low NULLS FIRST",
    )
    assert all(upper == lower for (_, upper), (lower, _) in itertools.pairwise(bounds[:-1]))
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        plain.execute("INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id) "
                      "SELECT gen_random_uuid(), 'x', now(), gen_random_uuid(), id FROM family_units LIMIT 1")  # fmt: skip
    plain.rollback()
    printed = owner("migrate", "--to", "partitioned")
    assert "created 0 partitions" in printed and rows(plain, BELONGS) == before
    plain.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
    plain.commit()


def test_a_cut_that_is_too_close_is_moved(plain: Connection) -> None:
    """A run was killed days ago, so that current ids are beyond its cut."""
    for table, key in (("events", "event_id"), ("metrics", "id")):
        plain.execute(f"ALTER TABLE analytics_{table} ADD CONSTRAINT analytics_{table}_until "
                      f"CHECK ({key} < analytics_id_at(now())) NOT VALID".encode())  # fmt: skip
    plain.commit()
    migrate.migrate(plain, lambda _: None)
    assert rows(plain, LAYOUT) == [("partitioned",)]
    assert (
        number(
            plain,
            "SELECT count(*) FROM analytics_partitions('events') WHERE low IS NULL AND high > analytics_id_at(now() + interval '1 day')",
        )
        == 1
    )


def test_the_application_waits_for_nothing_while_a_long_transaction_holds_its_table(
    plain: Connection, owner: Cli
) -> None:
    plain.execute(
        "CREATE SCHEMA auth; CREATE TABLE auth.users (id uuid PRIMARY KEY); INSERT INTO auth.users VALUES (gen_random_uuid())"
    )
    plain.commit()
    schema.apply_schema(plain, foreign_keys=True)
    with psycopg.connect(plain.info.dsn) as long, psycopg.connect(plain.info.dsn, autocommit=True) as user:
        long.execute("LOCK TABLE auth.users IN ROW EXCLUSIVE MODE")
        migration, slowest = Migration(owner), 0.0
        migration.until("creating analytics_events")
        for _ in range(200):
            begun = time.monotonic()
            user.execute("UPDATE auth.users SET id = id")
            slowest = max(slowest, time.monotonic() - begun)
        assert migration.process.poll() is None and slowest < 0.2 * slowness()
        long.rollback()
        migration.done()
