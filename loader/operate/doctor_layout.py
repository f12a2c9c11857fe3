"""Checks of the layout of the tables: partitions, indexes that outgrow memory, vacuum, rollups.

The checks read the catalog, file sizes, and only rows with ids that are in the default partition. So they are cheap on
large tables, and need no more privileges than a load.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from psycopg import sql

from loader.load.database import Connection, is_distributed
from loader.load.partitions import FIRST_DIVIDED, FIRST_OTHER, id_at, time_of
from loader.load.sqlstate import MIGRATION_CHECKS
from loader.load.tables import EVENTS, METRICS, Table
from loader.operate.finding import Finding, failed, ok, warning

_SHORT_RUNWAY: Final = timedelta(days=3)
_MANY_IN_DEFAULT: Final = 10_000
"""Number of rows above which creating a partition blocks the load, because it scans the default partition locked."""
_MANY_OTHER: Final = 0.05
"""Share of ids without a time above which partitioning gains little: they share one partition, as in a plain table."""
_LOCK_SHARE: Final = 0.5
"""Share of the server's locks that a query over all partitions may take."""
_CACHE_SHARE: Final = 0.5
"""Share of shared_buffers that indexes with random keys may take. A load writes to random pages of them."""
_REFRESH_MINUTES: Final = 15
"""Minutes within which touched hours should be computed: three times the longest pause of the daemon."""
_MIGRATE: Final = "`loader migrate --to partitioned`"


@dataclass(frozen=True)
class _Partition:
    """A partition and its range of ids: low <= id < high. None means no bound."""

    name: str
    low: str | None
    high: str | None
    is_default: bool
    size: int
    indexes: int
    options: str


def examine(connection: Connection) -> Iterator[Finding]:
    """Check the layout, in a transaction of database.py. Reports nothing if the tables do not exist."""
    kinds = dict(_rows(connection, _KINDS, [[EVENTS.name, METRICS.name]]))
    if unfinished := _rows(connection, _UNFINISHED, [list(MIGRATION_CHECKS)]):
        names = ", ".join(name for (name,) in unfinished)
        yield warning(
            "layout", f"a migration has not finished: rows of {names} may wait in the spool", _MIGRATE
        )
    elif kinds.get(EVENTS.name) == "r":
        yield from _plain(connection)
    divided = [table for table in (EVENTS, METRICS) if kinds.get(table.name) == "p"]
    found = {table: _partitions(connection, table) for table in divided}
    if found:
        yield from _partitioned(connection, found)
    yield from _rollups(connection)


def _plain(connection: Connection) -> Iterator[Finding]:
    """Report indexes with random keys that outgrow the cache; see loader/README.md, "Layouts"."""
    ((size, cache),) = _rows(connection, _RANDOM_INDEXES)
    like = (
        f"plain; indexes on users and families of {size / 1e6:.1f} MB, shared_buffers of {cache / 1e6:.1f} MB"
    )
    if size > _CACHE_SHARE * cache:
        remedy = f"{_MIGRATE}, or more shared_buffers: each row writes to a random page of these indexes"
        yield warning("layout", like, remedy)
    else:
        yield ok("layout", like)


def _partitioned(connection: Connection, found: dict[Table, list[_Partition]]) -> Iterator[Finding]:
    names = ", ".join(f"{len(partitions)} of {table.name}" for table, partitions in found.items())
    for check in (_other_ids, _locks, _unvacuumed):
        yield from check(connection, found)
    for table, partitions in found.items():
        yield from _runway(connection, table, partitions)
        yield from _waiting(connection, table, partitions)
    yield ok("layout", f"partitions: {names}")


def _runway(connection: Connection, table: Table, partitions: Sequence[_Partition]) -> Iterator[Finding]:
    """Report how far ahead partitions exist without a gap."""
    now = datetime.now(UTC)
    until = _covered_from(now, partitions)
    like = f"{table.name} has partitions until {until:%Y-%m-%d %H:%M}"
    remedy = "is a daemon of this version running (`loader run`)? `loader init` creates them now"
    if _rows(connection, _MAY_MAKE) == [(False,)]:
        remedy = (
            f"as the owner of the tables: `loader init --role {connection.info.user}`, which grants EXECUTE"
        )
    if until <= now:
        yield failed("runway", f"{table.name} has no partition for the current time", remedy)
    elif until - now < _SHORT_RUNWAY:
        yield warning("runway", like, remedy)
    else:
        yield ok("runway", like)


def _covered_from(moment: datetime, partitions: Sequence[_Partition]) -> datetime:
    """Return the end of the partitions without a gap from `moment` on, `moment` itself if it has none."""
    until = key = id_at(moment)
    for each in sorted(_divided(partitions), key=lambda each: each.low or ""):
        if (each.low or "") <= until < (each.high or "g"):
            until = each.high or FIRST_OTHER
    if until == key:
        return moment
    return time_of(until)


def _divided(partitions: Sequence[_Partition]) -> list[_Partition]:
    return [each for each in partitions if not each.is_default]


def _waiting(connection: Connection, table: Table, partitions: Sequence[_Partition]) -> Iterator[Finding]:
    """Report rows in the default partition, found by their ids: the role has no privilege on a single partition."""
    gaps = _gaps(partitions)
    if not gaps or not any(each.is_default for each in partitions) or not _may_read(connection, table.name):
        return
    key = sql.Identifier(table.key)
    within = sql.SQL(" OR ").join(
        sql.SQL("{0} >= {1} AND {0} < {2}").format(key, sql.Literal(low), sql.Literal(high))
        for low, high in gaps
    )
    statement = sql.SQL(
        "SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE version = '7'), "
        "pg_catalog.min(id) FILTER (WHERE version = '7'), pg_catalog.max(id) FILTER (WHERE version = '7') "
        "FROM (SELECT {0}::text AS id, pg_catalog.substr({0}::text, 15, 1) AS version "
        "FROM {1} WHERE {2} LIMIT {3}) AS found"
    ).format(key, sql.Identifier(table.name), within, sql.Literal(_MANY_IN_DEFAULT + 1))
    ((count, timed, low, high),) = connection.execute(statement).fetchall()
    if count > _MANY_IN_DEFAULT:
        yield failed(
            "default", f"more than {_MANY_IN_DEFAULT} rows of {table.name} are in the default partition",
            "`loader init` creates their partitions; if that takes too long, move them to a separate table",
        )  # fmt: skip
    elif timed:
        yield warning(
            "default", f"{timed} rows of {table.name} are in the default partition, ids {low} to {high}",
            "a running daemon creates their partitions each hour, `loader init` at once; ids of a later year come from "
            "a wrong clock",
        )  # fmt: skip
    else:
        yield ok("default", f"no row of {table.name} lacks its partition")


def _gaps(partitions: Sequence[_Partition]) -> list[tuple[str, str]]:
    """Return the ranges of ids within the divided time that only the default partition covers."""
    bounds = sorted((each.low or "", each.high or FIRST_OTHER) for each in _divided(partitions))
    edges = [("", FIRST_DIVIDED), *bounds, (FIRST_OTHER, "")]
    pairs = ((max(before, FIRST_DIVIDED), after) for (_, before), (after, _) in itertools.pairwise(edges))
    return [(before, after) for before, after in pairs if before < after]


def _other_ids(_: Connection, found: dict[Table, list[_Partition]]) -> Iterator[Finding]:
    """Report the share of data whose ids belong to no day, by size: every role can read the size of a partition."""
    for table, partitions in found.items():
        total = sum(each.size for each in partitions)
        other = sum(
            each.size for each in partitions
            if (each.low or "") >= FIRST_OTHER or (each.high or "g") <= FIRST_DIVIDED
        )  # fmt: skip
        share = other / total if total else 0.0
        like = f"about {share:.0%} of {table.name} has ids that are not UUIDv7, or not of 2020 to 2038"
        if share > _MANY_OTHER:
            remedy = (
                "let the emitter create event_id, or use UUIDv7: all other rows share one growing partition"
            )
            yield warning("ids", like, remedy)
        else:
            yield ok("ids", like)


def _locks(connection: Connection, found: dict[Table, list[_Partition]]) -> Iterator[Finding]:
    """Report whether a query over all partitions may run out of locks: it locks each partition and each index."""
    ((capacity, per_transaction),) = _rows(connection, _CAPACITY)
    needed = max(sum(1 + each.indexes for each in partitions) for partitions in found.values())
    like = f"a query over all partitions takes {needed} of {capacity} locks"
    if needed > _LOCK_SHARE * capacity:
        value = -(-2 * needed * per_transaction // capacity)
        yield warning(
            "locks", like,
            f"ALTER SYSTEM SET max_locks_per_transaction = {value}; and restart the server, or use wider partitions "
            "(`loader init --width week`) and keep less old data",
        )  # fmt: skip
    else:
        yield ok("locks", like)


def _unvacuumed(_: Connection, found: dict[Table, list[_Partition]]) -> Iterator[Finding]:
    names = [
        each.name for partitions in found.values() for each in partitions
        if any(f"autovacuum_enabled={no}" in each.options.split(",") for no in ("false", "off", "no", "0"))
    ]  # fmt: skip
    for name in names:
        remedy = f"ALTER TABLE {name} RESET (autovacuum_enabled);"
        yield warning("autovacuum", f"the partition {name} is not vacuumed, so reads become slow", remedy)
    if not names:
        yield ok("autovacuum", "on for all partitions")


def _rollups(connection: Connection) -> Iterator[Finding]:
    """Report hours that are not computed: they have a mark older than a load of _REFRESH_MINUTES ago."""
    tables = ("analytics_touched", "analytics_sealed", "analytics_loads")
    if not all(_may_read(connection, table) for table in tables):
        return  # older tables, or a role that does not load
    ((hours,),) = _rows(connection, _LEFT, [_REFRESH_MINUTES])
    if hours:
        yield warning(
            "rollups", f"{hours} touched hours have not been computed for more than {_REFRESH_MINUTES} minutes",
            "is a daemon of this version running (`loader run`)? `loader rollup` computes them now",
        )  # fmt: skip
    else:
        yield ok("rollups", "up to date")


def _partitions(connection: Connection, table: Table) -> list[_Partition]:
    statement = _PARTITIONS_DISTRIBUTED if is_distributed(connection) else _PARTITIONS
    return [_Partition(*row) for row in _rows(connection, statement, [table.name])]


def _may_read(connection: Connection, table: str) -> bool:
    return _rows(connection, _READABLE, [table]) == [(True,)]


def _rows(connection: Connection, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    return connection.execute(statement.encode(), values).fetchall()


_KINDS: Final = """
    SELECT relname, relkind::text FROM pg_catalog.unnest(%s::text[]) AS name
    JOIN pg_class ON oid = pg_catalog.to_regclass(name)::oid
"""
_UNFINISHED: Final = """
    SELECT conrelid::regclass::text FROM pg_constraint
    WHERE conname = ANY (%s::name[]) AND conrelid IN (
        pg_catalog.to_regclass('analytics_events')::oid, pg_catalog.to_regclass('analytics_metrics')::oid)
    ORDER BY 1
"""
_RANDOM_INDEXES: Final = """
    SELECT coalesce(pg_catalog.sum(pg_catalog.pg_relation_size(indexrelid)), 0)::bigint,
        pg_catalog.pg_size_bytes(pg_catalog.current_setting('shared_buffers'))
    FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
    WHERE indrelid = pg_catalog.to_regclass('analytics_events')::oid AND attname IN ('user_id', 'family_unit_id')
"""
_PARTITIONS: Final = r"""
    SELECT c.oid::regclass::text, nullif(bound[1], 'MINVALUE'), nullif(bound[2], 'MAXVALUE'), b.expression = 'DEFAULT',
        pg_catalog.pg_relation_size(c.oid), (SELECT pg_catalog.count(*) FROM pg_index WHERE indrelid = c.oid)::int,
        coalesce(pg_catalog.array_to_string(c.reloptions, ','), '')
    FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
    CROSS JOIN pg_catalog.pg_get_expr(c.relpartbound, c.oid) AS b (expression)
    LEFT JOIN pg_catalog.regexp_match(
        b.expression, '\(''?([0-9a-f-]{36}|MINVALUE)''?\) TO \(''?([0-9a-f-]{36}|MAXVALUE)''?\)') AS bound ON true
    WHERE i.inhparent = pg_catalog.to_regclass(%s)::oid ORDER BY 1
"""
_PARTITIONS_DISTRIBUTED: Final = _PARTITIONS.replace("pg_relation_size", "citus_relation_size")
"""The coordinator of Citus has no rows of its own."""
_CAPACITY: Final = """
    SELECT locks * (pg_catalog.current_setting('max_connections')::int
        + pg_catalog.current_setting('max_prepared_transactions')::int), locks
    FROM (SELECT pg_catalog.current_setting('max_locks_per_transaction')::int AS locks) AS setting
"""
_MAY_MAKE: Final = """
    SELECT pg_catalog.has_function_privilege(oid, 'EXECUTE') FROM pg_proc
    WHERE oid = pg_catalog.to_regproc('analytics_make_partitions')::oid
"""
_READABLE: Final = "SELECT pg_catalog.has_table_privilege(pg_catalog.to_regclass(%s)::oid, 'SELECT')"
_LEFT: Final = """
    SELECT pg_catalog.count(DISTINCT hour) FROM analytics_touched AS mark
    WHERE source <> 'users' AND hour <= pg_catalog.now() - interval '1 hour'
        AND pg_catalog.age(mark.xmin) > (SELECT pg_catalog.age(load.xmin) FROM analytics_loads AS load
            WHERE load.loaded_at < pg_catalog.now() - pg_catalog.make_interval(mins => %s::int)
            ORDER BY load.loaded_at DESC LIMIT 1)
        AND NOT EXISTS (
            SELECT FROM analytics_sealed AS sealed WHERE sealed.source = mark.source AND sealed.hour = mark.hour)
"""
"""A mark has no time. Its transaction is compared with that of a load, whose time is known."""
