"""The partitioned layout: each row is stored whatever its id is, and no session waits for a new partition."""

from __future__ import annotations

import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import make_conninfo

from loader.files import rejects
from loader.load import indexes, partitions, schema
from loader.load.batch import load
from loader.load.copying import in_range
from loader.load.database import Connection
from loader.load.tables import EVENTS, METRICS
from loader.service import daemon
from loader.service.run import Report
from loader.service.signals import Signals
from loader.service.workers import Workers
from tests.load.lines import chunk, event, metric, number, rows, segment
from tests.processes import Cli, eventually
from tests.servers import ROLE
from tests.servers import database as fresh_database

NOW = datetime.now(UTC)
TODAY = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
IN_DEFAULT = "SELECT count(*) FROM analytics_events_default"
PARTITIONS = (
    "SELECT analytics_id_time(low), analytics_id_time(high) FROM analytics_partitions('{}') "
    "WHERE NOT is_default ORDER BY low NULLS FIRST"
)
USERS = "CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY, name TEXT)"


def id_of(moment: datetime, n: int = 0) -> str:
    """Return a UUIDv7 of a moment."""
    milliseconds = int(moment.timestamp() * 1000)
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | n))


IDS: dict[str, Callable[[int], str]] = {
    "version 4": lambda n: str(uuid.UUID(int=(0x9F3C << 112) + n, version=4)),
    "version 4 below the others": lambda n: str(uuid.UUID(int=(0x0042 << 112) + n, version=4)),
    "now": lambda n: id_of(NOW, n),
    "late": lambda n: id_of(NOW - timedelta(days=90), n),
    "skewed": lambda n: id_of(NOW + timedelta(days=60), n),
    "1970": lambda n: id_of(datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), n),
    "2100": lambda n: id_of(datetime(2100, 1, 1, tzinfo=UTC), n),
    "nil": lambda _: str(uuid.UUID(int=0)),
    "max": lambda _: str(uuid.UUID(int=2**128 - 1)),
}


@pytest.fixture
def partitioned(server: str) -> Iterator[Connection]:
    """Yield the owner's connection."""
    with fresh_database(server, "partitioned") as dsn, psycopg.connect(dsn) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def one_partitioned(one_server: str) -> Iterator[Connection]:
    with fresh_database(one_server, "partitioned") as dsn, psycopg.connect(dsn) as connection:
        yield connection
        connection.rollback()


def loader_of(connection: Connection) -> str:
    return make_conninfo(connection.info.dsn, user=ROLE)


def load_spool(connection: Connection, spool: Path) -> Report:
    workers = Workers(lambda: loader_of(connection), spool, 1, Signals(), patience=0)
    try:
        return daemon.once(spool, workers, None)[1]
    finally:
        workers.close()


@pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])
def test_a_row_of_any_id_is_stored_once(partitioned: Connection, tmp_path: Path, duplicates: float) -> None:
    lines = [event(0, event_id=make(n)) for n, make in enumerate(IDS.values())]
    lines += [metric(0, event_id=make(n)) for n, make in enumerate(IDS.values())]
    tally = load(partitioned, [chunk(*lines, file="one")], tmp_path, duplicates)
    assert (tally.counts.events, tally.counts.metrics) == (len(IDS), len(IDS))
    again = load(partitioned, [chunk(*reversed(lines), file="two")], tmp_path, duplicates)
    assert (again.counts.duplicates, again.counts.lines) == (len(lines), len(lines))
    other = [event(0, event_id=make(n), metadata={"other": n}) for n, make in enumerate(IDS.values())]
    assert load(partitioned, [chunk(*other, file="three")], tmp_path, duplicates).counts.rejected == len(IDS)
    assert number(partitioned, "SELECT count(*) FROM analytics_events") == len(IDS)


def test_rows_are_in_the_partitions_of_their_ids(one_partitioned: Connection, tmp_path: Path) -> None:
    lines = [event(0, event_id=make(n)) for n, make in enumerate(IDS.values())]
    load(one_partitioned, [chunk(*lines)], tmp_path)
    found = rows(
        one_partitioned, "SELECT tableoid::regclass::text, count(*) FROM analytics_events GROUP BY 1"
    )
    assert dict(found) == {
        "analytics_events_other": 3, "analytics_events_early": 3, "analytics_events_default": 2,
        f"analytics_events_{NOW:%Y%m%d}": 1,
    }  # fmt: skip


# ---- bounds -------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["day", "week", "month"]), st.integers(-400, 300), st.integers(1, 25)),
        min_size=1, max_size=4,
    ),
    moments=st.lists(st.integers(0, 10**9), max_size=20),
)  # fmt: skip
def check_bounds(connection: Connection, calls: list[tuple[str, int, int]], moments: list[int]) -> None:
    """Check that the requested range is covered exactly once, in whatever order and width partitions are created."""
    with connection.transaction(force_rollback=True):
        for width, first, days in calls:
            connection.execute(
                "INSERT INTO analytics_settings VALUES ('partition_width', %s) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value", [width],
            )  # fmt: skip
            since, until = TODAY + timedelta(days=first), TODAY + timedelta(days=first + days)
            connection.execute("SELECT analytics_make_partitions(%s, %s, 1000)", [since, until])
            bounds = connection.execute(PARTITIONS.format("events").encode()).fetchall()
            for low, high in bounds:
                assert low is None or high is None or low < high
            for (_, high), (low, _) in itertools.pairwise(bounds):
                assert high <= low
            inside = [(low, high) for low, high in bounds if low and high and high > since and low < until]
            assert inside[0][0] <= since and inside[-1][1] >= until
            assert all(high == low for (_, high), (low, _) in itertools.pairwise(inside))
            for moment in moments:
                at = since + timedelta(milliseconds=moment) % (until - since)
                found = connection.execute(
                    "SELECT count(*) FROM analytics_partitions('metrics') "
                    "WHERE low <= analytics_id_at(%s) AND high > analytics_id_at(%s)", [at, at],
                )  # fmt: skip
                assert found.fetchone() == (1,)


def test_partition_bounds_have_no_gaps(one_partitioned: Connection) -> None:
    one_partitioned.execute("SET TIME ZONE 'America/St_Johns'")  # whose midnights are none of UTC
    one_partitioned.commit()
    check_bounds(one_partitioned)


@pytest.mark.parametrize(
    "moment", ["2026-11-25 00:00+00", "1970-01-01 00:00+00", "2038-12-31 23:59:59.999+00"]
)
def test_an_id_of_a_moment_is_the_smallest_one(one_partitioned: Connection, moment: str) -> None:
    found = one_partitioned.execute(
        "SELECT analytics_id_at(%(at)s)::text, analytics_id_time(analytics_id_at(%(at)s)) = %(at)s::timestamptz",
        {"at": moment},
    ).fetchone()
    assert found == (id_of(datetime.fromisoformat(moment)).replace("-7000-8", "-0000-0"), True)


# ---- making partitions --------------------------------------------------------------------------------


def test_rows_that_wait_in_the_default_partition_move_to_their_own(
    partitioned: Connection, tmp_path: Path
) -> None:
    days = [NOW - timedelta(days=90 + n) for n in range(3)]
    lines = [event(0, event_id=id_of(day, n)) for day in days for n in range(10)]
    lines += [event(0, event_id=IDS[name](n)) for n, name in enumerate(("version 4", "skewed", "2100"))]
    load(partitioned, [chunk(*lines)], tmp_path)
    assert number(partitioned, IN_DEFAULT) == 31
    partitioned.commit()
    with psycopg.connect(loader_of(partitioned)) as loader:
        assert partitions.make(loader) == 3
    assert number(partitioned, IN_DEFAULT) == 1  # the row of a wrong clock stays until its time
    assert number(partitioned, "SELECT count(*) FROM analytics_events") == 33
    for day in days:
        assert number(partitioned, f"SELECT count(*) FROM analytics_events_{day:%Y%m%d}") == 10


def test_no_reader_misses_rows_that_move_out_of_the_default_partition(
    one_partitioned: Connection, tmp_path: Path
) -> None:
    """A reader that waits for the default partition was planned for the partitions that existed before."""
    days = [NOW - timedelta(days=100 + n) for n in range(20)]
    lines = [event(0, event_id=id_of(day, n)) for day in days for n in range(50)]
    load(one_partitioned, [chunk(*lines)], tmp_path)
    one_partitioned.commit()
    counts: set[int] = set()
    done = threading.Event()

    def read() -> None:
        with psycopg.connect(one_partitioned.info.dsn, autocommit=True) as reader:
            while not done.is_set():
                found = reader.execute("SELECT count(*) FROM analytics_events", prepare=False)
                counts.update(count for (count,) in found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    with psycopg.connect(loader_of(one_partitioned)) as loader:
        assert partitions.make(loader) == 20
    done.set()
    for reader in readers:
        reader.join()
    assert number(one_partitioned, IN_DEFAULT) == 0
    assert counts == {len(lines)}


def test_two_loaders_make_partitions_at_once_beside_a_load(
    one_partitioned: Connection, tmp_path: Path
) -> None:
    since = TODAY - timedelta(days=300)
    made: list[int] = []

    def make() -> None:
        with psycopg.connect(loader_of(one_partitioned)) as loader:
            made.append(partitions.make(loader, since, since + timedelta(days=10)))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    loaded = 0
    while loaded < 20 or any(thread.is_alive() for thread in threads):
        day = since + timedelta(days=loaded % 10)
        ids = [id_of(day, 1000 * loaded + n) for n in range(20)]
        tally = load(one_partitioned, [chunk(*[event(0, event_id=id_) for id_ in ids])], tmp_path)
        assert tally.counts.events == 20
        loaded += 1
    assert sum(made) == 20
    assert number(one_partitioned, "SELECT count(*) FROM analytics_events") == 20 * loaded
    assert number(one_partitioned, IN_DEFAULT) == 0


def test_the_role_may_make_partitions_and_not_remove_or_read_one(one_partitioned: Connection) -> None:
    today = f"analytics_events_{NOW:%Y%m%d}"
    with psycopg.connect(loader_of(one_partitioned)) as loader:
        assert partitions.make(loader, TODAY + timedelta(days=100), TODAY + timedelta(days=101)) == 2
        for statement in (
            f"DROP TABLE {today}", f"ALTER TABLE analytics_events DETACH PARTITION {today}",
            f"SELECT FROM {today}", f"DELETE FROM {today}", "DELETE FROM analytics_events",
            "SELECT analytics_make_partition('events', 'event_id', now(), now())",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege), loader.transaction():
                loader.execute(statement.encode())


@pytest.mark.parametrize(
    ("since", "until"),
    [
        ("1970-01-01", "1970-01-02"),
        ("2200-01-01", "2200-01-02"),
        ("2026-01-01", "infinity"),
        ("-infinity", None),
    ],
)
def test_a_wrong_clock_makes_no_partition(one_partitioned: Connection, since: str, until: str | None) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="cannot create partitions"):
        one_partitioned.execute("SELECT analytics_make_partitions(%s, %s)", [since, until])


def test_a_temporary_table_of_the_caller_is_not_read(one_partitioned: Connection) -> None:
    with psycopg.connect(loader_of(one_partitioned)) as loader:
        loader.execute("CREATE TEMP TABLE analytics_settings AS SELECT 'layout' AS name, 'plain' AS value")
        loader.execute(
            "CREATE FUNCTION pg_temp.analytics_id_at(timestamptz) RETURNS uuid LANGUAGE sql AS 'SELECT NULL::uuid'"
        )
        loader.execute("SET search_path = pg_temp, public")
        since = TODAY + timedelta(days=200)
        assert loader.execute("SELECT public.analytics_make_partitions(%s, %s, 9)", [since, since + timedelta(days=1)]).fetchone() == (2,)  # fmt: skip


def test_a_table_that_has_the_name_of_a_partition_is_reported(one_partitioned: Connection) -> None:
    since = TODAY + timedelta(days=200)
    one_partitioned.execute(f"CREATE TABLE analytics_events_{since:%Y%m%d} (n INT)".encode())
    with pytest.raises(psycopg.errors.RaiseException, match="rename or drop it"):
        one_partitioned.execute(
            "SELECT analytics_make_partitions(%s, %s)", [since, since + timedelta(days=1)]
        )


def test_nobody_on_the_tables_of_the_application_waits_longer_than_an_attempt(
    one_partitioned: Connection,
) -> None:
    """While a transaction holds a lock on auth.users for a second, we do not block the update of another row."""
    one_partitioned.execute(
        f"{USERS}; INSERT INTO auth.users SELECT gen_random_uuid(), n FROM generate_series(1, 2) n"
    )
    one_partitioned.commit()
    schema.apply_schema(one_partitioned)
    since = TODAY + timedelta(days=100)
    longest = 0.0
    with (
        psycopg.connect(one_partitioned.info.dsn) as busy,
        psycopg.connect(one_partitioned.info.dsn) as other,
    ):
        busy.execute("UPDATE auth.users SET name = 'busy' WHERE name = '1'")
        making = threading.Thread(
            target=partitions.make, args=(one_partitioned, since, since + timedelta(days=3))
        )
        making.start()
        until = time.monotonic() + 1.5
        while time.monotonic() < until or making.is_alive():
            if time.monotonic() > until and busy.info.transaction_status:
                busy.commit()
            begun = time.monotonic()
            other.execute("UPDATE auth.users SET name = name WHERE name = '2'")
            other.commit()
            longest = max(longest, time.monotonic() - begun)
    keys = "SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND conrelid = '{}'::regclass"
    assert number(one_partitioned, keys.format(f"analytics_events_{since:%Y%m%d}")) == 1
    assert longest < 0.3  # 0.1 s for the lock, and this machine may be busy


# ---- without a partition ------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [b"", event(7, user_id=None)], ids=["alone", "beside a reject"])
def test_a_row_without_a_partition_waits_and_holds_up_no_other_file(
    partitioned: Connection, spool: Path, beside: bytes
) -> None:
    partitioned.execute("DROP TABLE analytics_events_default")
    partitioned.commit()
    waiting = [event(0, event_id=IDS["late"](1)), event(0, event_id=id_of(NOW, 1)), *filter(None, [beside])]
    segment(spool, 1, *waiting)
    for n in (2, 3, 4):
        segment(spool, n, event(0, event_id=id_of(NOW, n)))
    report = load_spool(partitioned, spool)
    (reason,) = report.failures.values()
    assert (
        'no partition of relation "analytics_events" found for row' in reason
        and "create the partition" in reason
    )
    assert number(partitioned, "SELECT count(*) FROM analytics_events") == 3
    assert not list(rejects.files(spool)) and len(list(spool.glob("*.ndjson"))) == 1
    partitioned.execute("CREATE TABLE analytics_events_default PARTITION OF analytics_events DEFAULT")
    partitioned.commit()
    assert not load_spool(partitioned, spool).failures
    assert number(partitioned, "SELECT count(*) FROM analytics_events") == 5
    assert len(list(rejects.files(spool))) == bool(beside)


def test_a_check_of_a_user_is_still_a_reason_to_reject(partitioned: Connection, spool: Path) -> None:
    partitioned.execute("ALTER TABLE analytics_events ADD CONSTRAINT short CHECK (length(event_type) < 5)")
    partitioned.commit()
    segment(spool, 1, event(1), event(2, event_type="tiny"))
    load_spool(partitioned, spool)
    assert number(partitioned, "SELECT count(*) FROM analytics_events") == 1
    assert len(list(rejects.files(spool))) == 1


# ---- lookups ------------------------------------------------------------------------------------------

some_ids = st.one_of(
    st.uuids().map(str),
    st.integers(0, 2**40).map(
        lambda ms: id_of(datetime(2023, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms % 10**11))
    ),
    st.sampled_from([str(uuid.UUID(int=0)), str(uuid.UUID(int=2**128 - 1))]),
)


@given(st.lists(some_ids, min_size=1))
def test_the_ranges_of_keys_hold_all_of_them_and_are_few(ids: list[str]) -> None:
    ranges = partitions.key_ranges(ids)
    assert len(ranges) <= partitions.MOST_RANGES
    assert all(any(low <= id_ <= high for low, high in ranges) for id_ in ids)
    assert all(low in ids and high in ids for low, high in ranges)
    assert ranges == sorted(ranges) and all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_a_batch_with_late_rows_and_other_versions_is_planned_for_few_partitions(
    one_partitioned: Connection,
) -> None:
    one_partitioned.execute("SELECT analytics_make_partitions(now() - interval '100 days', now(), 1000)")
    ids = [id_of(NOW + timedelta(seconds=n)) for n in range(100)] + [IDS["late"](1), IDS["version 4"](1)]
    for table in (EVENTS, METRICS):
        condition = in_range(table, ids).as_string(one_partitioned)
        lookup = f"SELECT FROM {table.name} WHERE {table.key} = wanted AND ({condition}) OFFSET 0"
        statement = f"EXPLAIN SELECT FROM unnest('{{{ids[0]}}}'::uuid[]) AS wanted CROSS JOIN LATERAL ({lookup}) AS found"
        plan = one_partitioned.execute(statement.encode()).fetchall()
        scans = [line for (line,) in plan if " on analytics_" in line]
        assert 1 <= len(scans) <= 4, scans


# ---- commands -----------------------------------------------------------------------------------------


@pytest.fixture
def old(one_server: str, spool: Path) -> Iterator[Cli]:
    """The owner's command line, for a database without tables."""
    with fresh_database(one_server, "template0") as dsn:
        yield Cli(spool, dsn)


def test_init_makes_partitions_of_the_width_that_was_chosen_and_remembers_it(old: Cli) -> None:
    printed = old("init", "--layout", "partitioned", "--width", "week", "--role", ROLE)
    assert "Layout: partitioned" in printed and "partitions" in printed
    assert json.loads(old("init", "--json"))["layout"] == "partitioned"
    with psycopg.connect(old.dsn) as connection:
        weeks = [bound for bound in rows(connection, PARTITIONS.format("metrics")) if all(bound)]
        assert len(weeks) >= 3 and all(high - low == timedelta(days=7) for low, high in weeks)
        assert weeks[-1][1] > NOW + timedelta(days=partitions.RUNWAY_DAYS)
    assert 'cannot become "plain"' in old("init", "--layout", "plain", code=1)


def test_init_does_not_convert_tables_that_exist(old: Cli) -> None:
    old("init")
    assert "loader migrate --to partitioned" in old("init", "--layout", "partitioned", code=1)
    assert json.loads(old("init", "--json"))["layout"] == "plain"


def test_the_daemon_and_a_load_by_hand_make_partitions_ahead(old: Cli, one_server: str) -> None:
    old("init", "--layout", "partitioned", "--role", ROLE)
    cli = Cli(old.spool, make_conninfo(old.dsn, user=ROLE))
    runway = (
        "SELECT max(analytics_id_time(high)) > now() + interval '14 days' FROM analytics_partitions('events') "
        "WHERE high < '02000000-0000-0000-0000-000000000000'"
    )
    drop = (
        "DO $$ DECLARE name TEXT; BEGIN FOR name IN SELECT partition FROM analytics_partitions('events') "
        "WHERE low > analytics_id_at(now()) AND high IS NOT NULL LOOP EXECUTE 'DROP TABLE ' || name; END LOOP; END $$"
    )
    with psycopg.connect(old.dsn, autocommit=True) as connection:
        connection.execute(drop.encode())
        assert not number(connection, runway)
        cli("run", "--once")
        assert number(connection, runway)
        connection.execute(drop.encode())
        with cli.daemon():
            eventually(lambda: number(connection, runway))


def test_backfill_makes_the_partitions_of_its_rows_first(old: Cli, tmp_path: Path) -> None:
    old("init", "--layout", "partitioned", "--role", ROLE)
    days = [NOW - timedelta(days=500 + n) for n in range(4)]
    file = tmp_path / "old.ndjson"
    file.write_bytes(b"\n".join(event(0, event_id=id_of(day, n)) for day in days for n in range(50)))
    Cli(old.spool, make_conninfo(old.dsn, user=ROLE))("backfill", file)
    with psycopg.connect(old.dsn) as connection:
        assert number(connection, IN_DEFAULT) == 0
        assert [
            number(connection, f"SELECT count(*) FROM analytics_events_{day:%Y%m%d}") for day in days
        ] == [50] * 4


def test_an_index_that_partitions_lack_is_built_beside_the_load(
    one_partitioned: Connection, tmp_path: Path
) -> None:
    load(one_partitioned, [chunk(event(0, event_id=id_of(NOW, 1)))], tmp_path)
    one_partitioned.execute("DROP INDEX analytics_events_type_seen")
    one_partitioned.commit()
    assert indexes.build(one_partitioned) == ["analytics_events_type_seen"]
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'analytics_events_type_seen'::regclass"
    assert rows(one_partitioned, valid) == [(True,)]
    one_partitioned.commit()
    assert indexes.build(one_partitioned) == []
