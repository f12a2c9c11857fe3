"""`loader migrate --to partitioned`: turns a plain table into the first partition, in place, beside loads and readers.

  step        lock on the tables                              state of the catalog afterwards
  ----------- ----------------------------------------------- --------------------------------------------------
  upgrade     see schema.py and indexes.py                    tables and indexes of this version
  key         none that a load or a reader waits for          unique index analytics_events_plain_pkey, valid
  cut         ACCESS EXCLUSIVE, a moment for each table       CHECK analytics_events_until, analytics_metrics_until
  check       none that a load or a reader waits for          the CHECKs are valid, unless rows lie beyond the cut
  frame       none; the tables that foreign keys refer to     analytics_events_partitioned and its partitions
  switch      ACCESS EXCLUSIVE, 0.3 s for both                the old tables are partitions
  finish      see schema.py and partitions.py                 foreign keys of the whole, partitions ahead of time

The catalog is the only state: each step first checks whether its result exists, so a run that was killed at any point
is continued by running it again. The cut is a midnight some days ahead. Only rows with an id at or beyond it (version
4, wrong clocks) are copied, in the transaction of the switch: until it commits, all sessions see them in the old
table. After the step "cut", loaders keep such rows waiting in the spool (sqlstate.lacks_partition); therefore it comes
after the slowest step.

Other sessions queue behind a lock request that is waiting. So a lock that conflicts with loads, readers or the
application is requested for at most 100 ms, and again after a pause. SHARE UPDATE EXCLUSIVE conflicts only with VACUUM
and other schema changes; it is requested without a limit, which cancels an autovacuum.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Final

import psycopg
from psycopg import sql

from loader.errors import LoaderError, OutOfReachError
from loader.load import indexes, partitions, schema
from loader.load.database import Connection, transaction
from loader.load.tables import EVENTS, METRICS, Table
from loader.operate import dependents, plain_table
from loader.operate.dependents import CannotMigrateError
from loader.operate.plain_table import Index, Shape, frame, frame_index, key_name, plain, plain_index, until

Report = Callable[[str], None]

TABLES: Final = (EVENTS, METRICS)
PATIENCE: Final = 600.0
"""Seconds after which the command stops waiting for a lock that other sessions hold."""
_CUT_DAYS: Final = 3
_LEAST_DAYS: Final = 1
"""Minimum distance of a cut. A closer one, left by an earlier run, is moved: current ids must lie below the cut."""
_LOCK_MILLISECONDS: Final = 100
_PAUSE_SECONDS: Final = 0.3
"""Average pause between two attempts to get a lock."""
_MANY_BEYOND: Final = 0.05
"""Share of rows beyond the cut, in no partition of a day, above which partitioning gains little."""


def migrate(
    connection: Connection, report: Report, width: schema.Width | None = None, patience: float = PATIENCE
) -> None:
    """Convert the tables to the partitioned layout, or finish the conversion if they already have it.

    `width` is the width of future partitions, None for the stored choice. The connection must not be in a
    transaction, and its role must own the tables. `report` is called with a line before each step, and after some.
    Raises CannotMigrateError with the obstacles, LoaderError, and psycopg.Error.
    """
    _Migration(connection, report, width, patience).run()


def plan(connection: Connection, report: Report) -> None:
    """Report what `migrate` would do, without changing anything. Raises the same errors as `migrate`."""
    _Migration(connection, report, None, 0.0).plan()


class _Migration:
    """One run. `_schema` is the schema of the tables."""

    def __init__(
        self, connection: Connection, report: Report, width: schema.Width | None, patience: float
    ) -> None:
        self._connection = connection
        self._report = report
        self._width = width
        self._patience = patience
        self._schema = ""

    def run(self) -> None:
        if not self._is_partitioned():
            self._refuse()
            self._upgrade()
            for table in TABLES:
                self._build_key(table)
            cut = self._cut()
            for table in TABLES:
                self._check(table, cut)
            shapes = {table: self._make_frame(table) for table in TABLES}
            self._switch(cut, shapes)
        self._finish()

    def plan(self) -> None:
        if self._is_partitioned():
            self._report("the tables are partitioned")
            return
        with transaction(self._connection):
            obstacles = dependents.find(self._connection, self._ids())
            cuts = [self._cut_of(table) for table in TABLES]
            keyed = self._has_key(EVENTS)
            sizes = [self._size(table) for table in TABLES]
        for size in sizes:
            self._report(size)
        if schema.schema_version(self._connection) < schema.SCHEMA_VERSION:
            self._report("to do: upgrade the tables, as `loader init` does")
        self._connection.rollback()
        if not keyed:
            self._report(f"to do: build the unique index {key_name(EVENTS)}, beside loads")
        if None in cuts:
            self._report("to do: keep rows with ids some days ahead waiting in the spool")
        self._report(
            "to do: check all rows beside loads, and copy those whose id is not a time before the cut"
        )
        self._report("to do: switch the tables, under an exclusive lock for less than half a second")
        if obstacles:
            raise CannotMigrateError(obstacles)

    # ---- the catalog ------------------------------------------------------------------------------------

    def _is_partitioned(self) -> bool:
        """Find the tables. Raises LoaderError if they do not exist, or were not partitioned by this package."""
        with self._connection.transaction():  # with the session's own search path, as `loader init`
            found = self._rows(_FIND_TABLES)
        if not found:
            raise LoaderError("the tables do not exist: `loader init --layout partitioned` creates them")
        ((self._schema, kinds),) = found
        if kinds == "rr":
            return False
        with transaction(self._connection):
            ours = self._rows(
                "SELECT FROM analytics_settings WHERE name = 'layout' AND value = 'partitioned'"
            )
        if kinds != "pp" or not ours:
            raise LoaderError(
                "cannot migrate: analytics_events and analytics_metrics are not two plain tables of `loader init`"
            )
        return True

    def _ids(self) -> list[int]:
        return [int(oid) for (oid,) in self._rows(_IDS, [[table.name for table in TABLES], self._schema])]

    def _has_key(self, table: Table) -> bool:
        """Whether the table has a valid index that is or can become the primary key of a partition."""
        shape = self._shape(table)
        return any(
            index.valid and index.columns == (table.key,) and (index.name == key_name(table) or index.primary)
            for index in shape.indexes
        )

    def _shape(self, table: Table) -> Shape:
        return plain_table.shape(self._connection, self._quoted(table.name))

    def _cut_of(self, table: Table) -> str | None:
        """Return the lowest id that the table refuses, None if it has no limit."""
        found = self._rows(_CONSTRAINT, [self._quoted(table.name), until(table)])
        bound = re.search(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", found[0][0]) if found else None
        return bound[0] if bound else None

    def _size(self, table: Table) -> str:
        ((rows, size),) = self._rows(_SIZE, [self._quoted(table.name)])
        return f"{table.name}: about {max(int(rows), 0):,} rows, {size / 1e9:.1f} GB"

    # ---- the steps --------------------------------------------------------------------------------------

    def _refuse(self) -> None:
        with transaction(self._connection):
            for table in TABLES:
                self._report(self._size(table))
            if obstacles := dependents.find(self._connection, self._ids()):
                raise CannotMigrateError(obstacles)

    def _upgrade(self) -> None:
        self._report("upgrading the tables and indexes to this version")
        schema.apply_schema(self._connection, width=self._width)
        for name in indexes.build(self._connection):
            self._report(f"built the index {name}")

    def _build_key(self, table: Table) -> None:
        """Build the unique index that becomes the partition's primary key. Metrics already have theirs."""
        with transaction(self._connection):
            self._keep_changes_away([table])  # the server process of a killed run may still be building it
            exists = self._has_key(table)
            half_built = key_name(table) in {index.name for index in self._shape(table).indexes}
        if exists:
            return
        name, begun = sql.Identifier(self._schema, key_name(table)), time.monotonic()
        self._report(f"building the unique index {key_name(table)}, beside loads and readers")
        with indexes.in_no_transaction(self._connection):
            if half_built:
                self._do("DROP INDEX CONCURRENTLY IF EXISTS {}", name)
            self._do(
                "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS {} ON {} ({})",
                sql.Identifier(key_name(table)), self._name(table.name), sql.Identifier(table.key),
            )  # fmt: skip
        self._report(f"built it in {time.monotonic() - begun:.1f} s")

    def _cut(self) -> str:
        """Return the cut, also one of an earlier run. From now on the tables refuse rows at or beyond it."""
        with transaction(self._connection):
            cuts = {self._cut_of(table) for table in TABLES}
            ((now,),) = self._rows("SELECT pg_catalog.now()")
        (cut, *others) = cuts
        if cut is not None and not others and partitions.time_of(cut) > now + timedelta(days=_LEAST_DAYS):
            return cut
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=_CUT_DAYS)
        cut = partitions.id_at(midnight)
        self._report(
            f"the cut is {midnight:%Y-%m-%d}: rows with a later id wait in the spool until the switch"
        )
        for table in TABLES:
            self._until_locked(partial(self._limit, table, cut))
        return cut

    def _limit(self, table: Table, cut: str) -> None:
        self._keep_changes_away([table])
        self._do(
            "ALTER TABLE {0} DROP CONSTRAINT IF EXISTS {1}, ADD CONSTRAINT {1} CHECK ({2} < {3}) NOT VALID",
            self._name(table.name), sql.Identifier(until(table)), sql.Identifier(table.key), sql.Literal(cut),
        )  # fmt: skip

    def _check(self, table: Table, cut: str) -> None:
        """Validate the limit of the table, unless the switch has to move some rows first."""
        self._report(f"checking all rows of {table.name}, beside loads and readers")
        with transaction(self._connection):
            statement = sql.SQL("SELECT pg_catalog.count(*) FROM {} WHERE {} >= {}").format(
                self._name(table.name), sql.Identifier(table.key), sql.Literal(cut)
            )
            ((beyond,),) = self._connection.execute(statement).fetchall()
            if not beyond:
                self._validate(table)
                return
            ((rows, _),) = self._rows(_SIZE, [self._quoted(table.name)])
        self._report(f"{beyond:,} rows of {table.name} lie beyond the cut and will be moved by the switch")
        if beyond > _MANY_BEYOND * max(rows, 1):
            self._report(
                f"Warning: that is more than {_MANY_BEYOND:.0%} of the rows, which will be in no partition of a day: "
                "partitioning gains little"
            )

    def _validate(self, table: Table) -> None:
        self._keep_changes_away([table])
        self._do(
            "ALTER TABLE {} VALIDATE CONSTRAINT {}", self._name(table.name), sql.Identifier(until(table))
        )

    def _make_frame(self, table: Table) -> Shape:
        """Create the partitioned table beside the old one, replacing that of a killed run, and return its shape."""
        self._report(f"creating {frame(table)}")
        shapes: list[Shape] = []

        def make() -> None:
            shapes.append(self._shape(table))
            self._create_frame(table)
            self._create_indexes(table, shapes[-1])
            self._create_leaves(table, shapes[-1])

        self._until_locked(make)
        return shapes[-1]

    def _create_frame(self, table: Table) -> None:
        parent = self._name(frame(table))
        self._do("DROP TABLE IF EXISTS {}", parent)
        self._do(
            "CREATE TABLE {} (LIKE {} INCLUDING DEFAULTS INCLUDING GENERATED INCLUDING CONSTRAINTS INCLUDING STORAGE "
            "INCLUDING COMPRESSION INCLUDING COMMENTS INCLUDING STATISTICS) PARTITION BY RANGE ({})",
            parent, self._name(table.name), sql.Identifier(table.key),
        )  # fmt: skip
        self._do("ALTER TABLE {} DROP CONSTRAINT IF EXISTS {}", parent, sql.Identifier(until(table)))
        self._do("ALTER TABLE {} ADD PRIMARY KEY ({})", parent, sql.Identifier(table.key))

    def _create_indexes(self, table: Table, shape: Shape) -> None:
        """Create each index of the old table on the frame: the switch would build missing ones under its lock."""
        for number, index in enumerate(shape.kept(table)):
            self._do(
                "CREATE {} {} ON {} USING {}", sql.SQL("UNIQUE INDEX" if index.unique else "INDEX"),
                sql.Identifier(frame_index(table, number)), self._name(frame(table)), _trusted(index.definition),
            )  # fmt: skip
            if index.comment is not None:
                self._do(
                    "COMMENT ON INDEX {} IS {}",
                    self._name(frame_index(table, number)),
                    sql.Literal(index.comment),
                )

    def _create_leaves(self, table: Table, shape: Shape) -> None:
        ((owner,),) = self._rows(_OWNER, [self._quoted(table.name)])
        bounds = {
            "other": sql.SQL("FOR VALUES FROM ({}) TO (MAXVALUE)").format(
                sql.Literal(partitions.FIRST_OTHER)
            ),
            "default": sql.SQL("DEFAULT"),
        }
        for suffix, bound in bounds.items():
            leaf = self._name(f"{table.name}_{suffix}")
            self._do(
                "CREATE TABLE {} PARTITION OF {} {} WITH (autovacuum_vacuum_insert_scale_factor = 0.01)",
                leaf, self._name(frame(table)), bound,
            )  # fmt: skip
            for name, words in shape.valid_keys():
                self._do("ALTER TABLE {} ADD CONSTRAINT {} {}", leaf, sql.Identifier(name), _trusted(words))
            self._do("ALTER TABLE {} OWNER TO {}", leaf, sql.Identifier(owner))
        self._do("ALTER TABLE {} OWNER TO {}", self._name(frame(table)), sql.Identifier(owner))

    # ---- the switch -------------------------------------------------------------------------------------

    def _switch(self, cut: str, shapes: dict[Table, Shape]) -> None:
        self._report("switching")
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with transaction(self._connection):
                    self._prepare_switch(cut, shapes)
                    old = self._ids()
                    views, functions = dependents.ours(self._connection, old)
                    begun = self._lock_out_everybody(views, deadline)
                    for table, shape in shapes.items():
                        self._exchange(table, shape)
                    self._attach(cut)
                    schema.bind_again(self._connection, self._schema, [*views, *functions])
                    if left := dependents.users(self._connection, old):  # created after the earlier steps
                        raise CannotMigrateError(left)
                self._report(f"switched: the tables were locked for at most {time.monotonic() - begun:.2f} s")
                return
            except psycopg.errors.DeadlockDetected as error:
                self._pause(error, deadline)

    def _prepare_switch(self, cut: str, shapes: dict[Table, Shape]) -> None:
        """Do the slow part before the lock, and check that nothing has changed since the earlier steps."""
        # schema.sql takes the same lock.
        self._do("SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext('analytics_schema'))")
        self._keep_changes_away(TABLES)
        for table, shape in shapes.items():
            if self._shape(table) != shape or self._cut_of(table) != cut or not self._has_key(table):
                raise LoaderError(
                    f"{table.name} was changed in the meantime: run the command again to continue"
                )
            if not self._is_checked(table):
                self._move_beyond(table, shape, cut)
                self._validate(table)
        self._do("INSERT INTO analytics_settings (name, value) VALUES ('layout', 'partitioned') "
                 "ON CONFLICT (name) DO UPDATE SET value = excluded.value")  # fmt: skip

    def _is_checked(self, table: Table) -> bool:
        return self._rows(_CONSTRAINT, [self._quoted(table.name), until(table)])[0][1] is True

    def _move_beyond(self, table: Table, shape: Shape, cut: str) -> None:
        """Move rows to the partitions other and default. Readers see them in the old table until COMMIT."""
        columns = sql.SQL(", ").join(map(sql.Identifier, shape.written()))
        self._do(
            "WITH moved AS (DELETE FROM {0} WHERE {1} >= {2} RETURNING *) INSERT INTO {3} ({4}) SELECT {4} FROM moved",
            self._name(table.name), sql.Identifier(table.key), sql.Literal(cut), self._name(frame(table)), columns,
        )  # fmt: skip

    def _lock_out_everybody(self, views: Sequence[str], deadline: float) -> float:
        """Lock all replaced tables and views, and return the time at which they were locked.

        One statement locks them all, so its timeout limits how long a lock is held while waiting for the next one.
        Views are locked before tables, in the order in which a reader locks them.
        """
        names = (*views, *(name for table in TABLES for name in (table.name, frame(table))))
        lock = sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(
            sql.SQL(", ").join(map(self._name, names))
        )
        while True:
            begun = time.monotonic()
            try:
                with self._connection.transaction():  # a savepoint: a timeout does not undo the earlier work
                    self._do(
                        "SET LOCAL statement_timeout = {}", sql.Literal(_LOCK_MILLISECONDS)
                    )  # for all locks together
                    self._connection.execute(lock)
                    self._do("SET LOCAL statement_timeout = 0")
                return begun
            except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
                self._pause(error, deadline)

    def _exchange(self, table: Table, shape: Shape) -> None:
        """Move the names of the old table and its indexes, its privileges and its sequences to the frame."""
        old, new = self._name(plain(table)), self._name(table.name)
        ((privileges, comment, sequences),) = self._rows(_BELONGINGS, {"table": self._quoted(table.name)})
        primary = [index.name for index in shape.indexes if index.columns == (table.key,) and index.primary]
        self._do("ALTER TABLE {} RENAME TO {}", self._name(table.name), sql.Identifier(plain(table)))
        for index in shape.replaced(table):
            if index.name not in primary:
                self._drop(old, index)
        if not primary:
            key = sql.Identifier(key_name(table))
            self._do("ALTER TABLE {} ADD CONSTRAINT {} PRIMARY KEY USING INDEX {}", old, key, key)
        for name in primary:
            if name != key_name(table):
                self._rename_index(name, key_name(table))
        for number, index in enumerate(shape.kept(table)):
            self._rename_index(index.name, plain_index(table, index.name, number))
            self._rename_index(frame_index(table, number), index.name)
        self._do("ALTER TABLE {} RENAME TO {}", self._name(frame(table)), sql.Identifier(table.name))
        self._rename_index(f"{frame(table)}_pkey", f"{table.name}_pkey")
        self._hand_over(old, new, privileges, sequences)
        if comment is not None:
            self._do("COMMENT ON TABLE {} IS {}", new, sql.Literal(comment))

    def _drop(self, table: sql.Identifier, index: Index) -> None:
        if index.constraint is not None:
            self._do("ALTER TABLE {} DROP CONSTRAINT {}", table, sql.Identifier(index.constraint))
        else:
            self._do("DROP INDEX {}", self._name(index.name))

    def _hand_over(
        self, old: sql.Identifier, new: sql.Identifier, privileges: Iterable[Any], sequences: Iterable[Any]
    ) -> None:
        for grantee in {grantee for _, grantee, _, _ in privileges}:
            for table in (new, old):  # the new table may have got default privileges
                self._do("REVOKE ALL ON {} FROM {}", table, _trusted(grantee))
        for privilege, grantee, grantable, column in privileges:
            self._do(
                "GRANT {}{} ON {} TO {}{}", _trusted(privilege),
                sql.SQL(" ({})").format(sql.Identifier(column)) if column else sql.SQL(""), new, _trusted(grantee),
                sql.SQL(" WITH GRANT OPTION" if grantable else ""),
            )  # fmt: skip
        for sequence, column in sequences:
            self._do("ALTER SEQUENCE {} OWNED BY {}.{}", _trusted(sequence), new, sql.Identifier(column))

    def _attach(self, cut: str) -> None:
        for table in TABLES:
            old = self._name(plain(table))
            self._do(
                "ALTER TABLE {} ATTACH PARTITION {} FOR VALUES FROM (MINVALUE) TO ({})",
                self._name(table.name), old, sql.Literal(cut),
            )  # fmt: skip
            self._do("ALTER TABLE {} DROP CONSTRAINT {}", old, sql.Identifier(until(table)))

    def _finish(self) -> None:
        """Do what `loader init` does: foreign keys of the partitions become those of the partitioned table."""
        applied = schema.apply_schema(self._connection, width=self._width)
        made = partitions.make(self._connection)
        for warning in applied.warnings:
            self._report(f"Warning: {warning}")
        self._report(f"the tables are partitioned; created {made} partitions for the next days")

    # ---- locks and statements ---------------------------------------------------------------------------

    def _keep_changes_away(self, tables: Sequence[Table]) -> None:
        names = sql.SQL(", ").join(self._name(table.name) for table in tables)
        ((before,),) = self._rows("SELECT pg_catalog.current_setting('lock_timeout')")
        self._do("SET LOCAL lock_timeout = 0")
        self._do("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE", names)
        self._do("SET LOCAL lock_timeout = {}", sql.Literal(before))

    def _until_locked(self, step: Callable[[], None]) -> None:
        """Repeat a step, each time in its own transaction, until it gets its locks."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with transaction(self._connection):
                    self._do("SET LOCAL lock_timeout = {}", sql.Literal(_LOCK_MILLISECONDS))
                    step()
                return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
                self._pause(error, deadline)

    def _pause(self, error: psycopg.Error, deadline: float) -> None:
        if time.monotonic() > deadline:
            message = f"{error.diag.message_primary} for {self._patience:g} s: run the command again at a quieter time"
            raise OutOfReachError(message) from error
        time.sleep(random.uniform(0.5, 1.5) * _PAUSE_SECONDS)  # the release of a lock is not reported

    def _name(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._schema, name)

    def _quoted(self, name: str) -> str:
        return self._name(name).as_string(self._connection)

    def _rename_index(self, before: str, after: str) -> None:
        self._do("ALTER INDEX {} RENAME TO {}", self._name(before), sql.Identifier(after))

    def _do(self, statement: str, *values: sql.Composable) -> None:
        self._connection.execute(_trusted(statement).format(*values))

    def _rows(self, statement: str, values: Any = None) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement.encode(), values).fetchall()


def _trusted(text: str) -> sql.SQL:
    """Return SQL from a constant or from a function of the catalog. Never call it with other input."""
    return sql.SQL(text)


# All names are qualified with pg_catalog: see database.py.
_FIND_TABLES: Final = """
    SELECT n.nspname, pg_catalog.string_agg(c.relkind::pg_catalog.text, '' ORDER BY c.relname)
    FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
    JOIN pg_catalog.pg_class AS found ON found.relnamespace OPERATOR(pg_catalog.=) n.oid
    WHERE found.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass('analytics_events')::pg_catalog.oid
        AND c.relname::pg_catalog.text OPERATOR(pg_catalog.=) ANY (ARRAY['analytics_events', 'analytics_metrics'])
    GROUP BY n.nspname
"""
_IDS: Final = """
    SELECT c.oid::bigint FROM pg_catalog.unnest(%s::text[]) AS wanted
    JOIN pg_class AS c ON c.relname = wanted::name JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname = %s
"""
_SIZE: Final = """
    SELECT reltuples::bigint, pg_catalog.pg_total_relation_size(oid) FROM pg_class WHERE oid = %s::regclass::oid
"""
_OWNER: Final = "SELECT pg_catalog.pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s::regclass::oid"
_CONSTRAINT: Final = """
    SELECT pg_catalog.pg_get_constraintdef(oid), convalidated FROM pg_constraint
    WHERE conrelid = %s::regclass::oid AND conname = %s AND contype = 'c'
"""
_BELONGINGS: Final = """
    SELECT (
            SELECT coalesce(pg_catalog.json_agg(pg_catalog.json_build_array(acl.privilege_type,
                coalesce(pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(nullif(acl.grantee, 0))), 'PUBLIC'),
                acl.is_grantable, given.attname)), '[]')
            FROM (
                SELECT relacl AS acl, NULL::text AS attname FROM pg_class WHERE oid = c.oid
                UNION ALL SELECT attacl, attname::text FROM pg_attribute
                WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
            ) AS given
            CROSS JOIN pg_catalog.aclexplode(given.acl) AS acl WHERE acl.grantee <> c.relowner),
        pg_catalog.obj_description(c.oid, 'pg_class'),
        (
            SELECT coalesce(pg_catalog.json_agg(pg_catalog.json_build_array(d.objid::regclass::text, a.attname)), '[]')
            FROM pg_depend AS d
            JOIN pg_class AS s ON s.oid = d.objid AND s.relkind = 'S'
            JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
            WHERE d.classid = 'pg_class'::regclass::oid AND d.refclassid = 'pg_class'::regclass::oid
                AND d.refobjid = c.oid AND d.deptype = 'a')
    FROM pg_class AS c WHERE c.oid = %(table)s::regclass::oid
"""
"""Privileges, the comment, and the sequences owned by columns."""
