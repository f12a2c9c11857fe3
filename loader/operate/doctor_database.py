"""Checks of the database: the tables, the role, the server and the ledger. Changes nothing."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, ParamSpec

import psycopg

from loader.files import writers as writer_files
from loader.files.writers import Stated
from loader.load import deviations, schema, writers
from loader.load.database import Connection, is_distributed, transaction
from loader.load.deviations import Severity
from loader.load.dropped import dropped, unreported
from loader.load.sqlstate import explain
from loader.operate import doctor_layout
from loader.operate.finding import Finding, failed, ok, warning
from spool.account import Statement

_CLOCK_SECONDS: Final = 5.0
_OLDEST_SERVER: Final = 13
"""The first version with a built-in `gen_random_uuid()`; 15 and later are tested."""
_SHOWN_DROPS: Final = 5
_SHORT_TIMEOUT: Final = 60_000
"""Milliseconds within which every statement of a load should end, even on a busy server."""
_UNREADABLE_ERASURES: Final = (
    "SELECT name FROM pg_catalog.unnest(ARRAY['analytics_erasures', 'analytics_erasure_keys']) AS name "
    "WHERE NOT pg_catalog.has_table_privilege(pg_catalog.to_regclass(name)::pg_catalog.oid, 'SELECT')"
)
"""Every load reads these tables. Older schemas lack them; the condition is null there."""
_TABLES: Final = ("analytics_events", "analytics_metrics", "analytics_loads")
_TABLE_PRIVILEGES: Final = (
    "SELECT name, privilege, pg_catalog.has_table_privilege(name, privilege) "
    "FROM pg_catalog.unnest(%s::text[]) AS name, "
    "pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE']) AS privilege"
)
_MAY_USE_PLPGSQL: Final = (
    "SELECT coalesce(pg_catalog.bool_or(pg_catalog.has_language_privilege(oid, 'USAGE')), false) "
    "FROM pg_catalog.pg_language WHERE lanname OPERATOR(pg_catalog.=) 'plpgsql'::name"
)
_SETTINGS: Final = (
    "SELECT name, setting, source FROM pg_catalog.pg_settings "
    "WHERE name OPERATOR(pg_catalog.=) ANY (%s::text[])"
)
_UNSAFE_SETTINGS: Final = {
    "fsync": "a server crash may lose or damage loaded rows whose files are already removed",
    "full_page_writes": "a server crash may damage tables",
    "synchronous_commit": "a server crash may lose rows of other clients; the loader sets it to on for itself",
    "autovacuum": "tables grow, and planner statistics become outdated",
    "track_counts": "autovacuum does not run, so tables grow",
}
"""Settings that must not be off, with the consequence."""
_REPLICATION_ROLE: Final = "session_replication_role"
_TIMEOUTS: Final = (
    "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout",
    "idle_session_timeout",
)  # fmt: skip
_IDENTITY_VERSION: Final = 4
"""The first schema version that stores whether an identity is required."""
_IDENTITY_COLUMNS: Final = ("user_id", "family_unit_id")
_IDENTITY: Final = f"""
    SELECT coalesce((SELECT value FROM analytics_settings WHERE name = 'identity'), 'required'),
        ARRAY(SELECT attname::text FROM pg_catalog.pg_attribute
            WHERE attrelid = pg_catalog.to_regclass('analytics_events')::oid AND attnotnull
                AND attname::text IN {_IDENTITY_COLUMNS} ORDER BY attnum)
"""
_CONNECTION_LIMITS: Final = (
    "SELECT rolconnlimit, (SELECT datconnlimit FROM pg_catalog.pg_database "
    "WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()) "
    "FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user"
)
_CREATORS: Final = """
    SELECT n.nspname, CASE WHEN acl.grantee OPERATOR(pg_catalog.=) 0 THEN 'PUBLIC' ELSE r.rolname::text END
    FROM pg_catalog.pg_class c
    JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
    CROSS JOIN LATERAL pg_catalog.aclexplode(n.nspacl) AS acl
    LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) acl.grantee
    WHERE c.oid OPERATOR(pg_catalog.=) pg_catalog.to_regclass('analytics_events')::oid
        AND acl.privilege_type OPERATOR(pg_catalog.=) 'CREATE' AND NOT coalesce(r.rolsuper, false)
        AND acl.grantee OPERATOR(pg_catalog.<>) n.nspowner AND acl.grantee OPERATOR(pg_catalog.<>) c.relowner
    ORDER BY 2
"""
"""Other roles that may create objects in the schema of the tables."""


def examine(
    connection: Connection, spool: Path | None, stated: Sequence[tuple[Statement, bool]], workers: int
) -> Iterator[Finding]:
    """Check the database for a loader with so many workers and this spool. Raises psycopg.Error."""
    with connection.transaction():
        found = _settings(connection)
    with transaction(connection):
        for inspect in (_server, _clock, _schema, _tables, _identity, _privileges, _creators):
            yield from _as_far_as_allowed(connection, inspect, connection)
        if is_distributed(connection):
            yield from _as_far_as_allowed(connection, _workers, connection)
        yield from _durability(connection, found)
        yield from _limits(connection, found, workers)
        yield from _as_far_as_allowed(connection, _drops, connection, stated)
        yield from _as_far_as_allowed(connection, _conservation, connection, spool, stated)
        yield from _as_far_as_allowed(connection, doctor_layout.examine, connection)


P = ParamSpec("P")


def _as_far_as_allowed(
    connection: Connection, check: Callable[P, Iterator[Finding]], *args: P.args, **kwargs: P.kwargs
) -> list[Finding]:
    """Return the findings of a check, or that the role lacks a privilege for it; other checks still run."""
    try:
        with connection.transaction():
            return list(check(*args, **kwargs))
    except psycopg.errors.InsufficientPrivilege as error:
        return [failed("privileges", str(explain(error)), "")]


def _server(connection: Connection) -> Iterator[Finding]:
    version = connection.info.server_version // 10000
    row = connection.execute("SHOW transaction_read_only").fetchone()
    if version < _OLDEST_SERVER:
        yield failed("server", f"PostgreSQL {version} is too old", f"use {_OLDEST_SERVER} or later")
    elif row == ("on",):
        yield failed(
            "server", "the server is read-only", "connect to the primary: target_session_attrs=read-write"
        )
    else:
        yield ok("server", f"PostgreSQL {version}")


_WORKERS: Final = (
    "SELECT nodename, nodeport, success, result FROM run_command_on_workers("
    "'SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_xacts "
    "WHERE prepared < pg_catalog.now() - interval ''5 minutes''') ORDER BY 1, 2"
)
"""After a Citus worker died in a COMMIT, it has prepared transactions whose rows are not visible. Citus resolves them
within a minute (citus.recover_2pc_interval)."""


def _workers(connection: Connection) -> Iterator[Finding]:
    """Report workers of Citus that do not answer, or have unresolved prepared transactions."""
    found = connection.execute(_WORKERS).fetchall()
    for name, port, answers, result in found:
        if not answers:
            yield failed(
                "workers", f"{name}:{port} does not answer: {result}", "start it; the loader waits for it"
            )
        elif int(result):
            finding = f"{name}:{port} has {result} prepared transactions, whose rows are not visible yet"
            yield warning("workers", finding, "SELECT recover_prepared_transactions(), as a superuser")
    if not found:
        yield failed("workers", "the Citus cluster has no workers", "SELECT citus_add_node(...)")
    elif all(answers and not int(result) for _, _, answers, result in found):
        yield ok("workers", f"{len(found)} answer")


def _clock(connection: Connection) -> Iterator[Finding]:
    begun = time.time()
    ((server,),) = connection.execute(
        "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::float"
    ).fetchall()
    away = server - (begun + time.time()) / 2
    like = f"{abs(away):.1f} s {'before' if away < 0 else 'after'} this machine's"
    if abs(away) > _CLOCK_SECONDS:
        yield warning(
            "clock", f"the server's is {like}", "timedatectl set-ntp true, on this host and on the server"
        )
    else:
        yield ok("clock", "in sync with the server")


def _schema(connection: Connection) -> Iterator[Finding]:
    version, ours = schema.schema_version(connection), schema.SCHEMA_VERSION
    if not version:
        yield failed("schema", "the tables do not exist", "`loader init`")
    elif version < ours:
        yield warning("schema", f"version {version} is older than this loader's {ours}", "`loader init`")
    elif version > ours:
        yield warning("schema", f"version {version} is newer than this loader's {ours}", "upgrade the loader")
    else:
        yield ok("schema", f"version {version}")


def _tables(connection: Connection) -> Iterator[Finding]:
    found = deviations.find(connection)
    for each in found:
        report = warning if each.severity is Severity.RISK else failed
        yield report("tables", f'"{each.table}" {each.problem}', each.remedy)
    if not found:
        yield ok("tables", "compatible with the loader")


def _identity(connection: Connection) -> Iterator[Finding]:
    """Report whether events need a user and a family, and whether the table matches the configuration."""
    if schema.schema_version(connection) < _IDENTITY_VERSION:
        return
    ((chosen, required),) = connection.execute(_IDENTITY).fetchall()
    like = f"required by {' and '.join(required)}" if required else "optional"
    if chosen == "optional" and required:
        yield warning("identity", f"configured as optional, but {like}", "`loader init --optional-identity`")
    elif chosen == "required" and len(required) < len(_IDENTITY_COLUMNS):
        yield warning(
            "identity", "configured as required, but the table accepts events without a user or a family",
            "`loader init --required-identity`, or --optional-identity",
        )  # fmt: skip
    else:
        remedy = "; events without them become rejects (`loader init --optional-identity` accepts them)"
        yield ok(
            "identity", like + (remedy if required else ": events without a user or a family are accepted")
        )


def _privileges(connection: Connection) -> Iterator[Finding]:
    if not schema.schema_version(connection):
        return
    user = connection.info.user
    missing: dict[str, list[str]] = {}
    needless: dict[str, list[str]] = {}
    for table, privilege, has in connection.execute(_TABLE_PRIVILEGES, [list(_TABLES)]):
        needed = privilege in ("SELECT", "INSERT")
        if has != needed:
            (missing if needed else needless).setdefault(privilege, []).append(table)
    for (table,) in connection.execute(_UNREADABLE_ERASURES):
        missing.setdefault("SELECT", []).append(table)
    temporary = "SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')"
    if connection.execute(temporary).fetchone() != (True,):
        missing["TEMPORARY"] = ["the database"]
    may_use_plpgsql = connection.execute(_MAY_USE_PLPGSQL).fetchone() == (True,)
    if not may_use_plpgsql:
        yield failed(
            "privileges", f"{user} lacks USAGE on the language plpgsql, so refused rows cannot be isolated",
            f'as a superuser: GRANT USAGE ON LANGUAGE plpgsql TO "{user}";',
        )  # fmt: skip
    grant = f"as the owner of the tables: `loader init --role {user}`"
    if missing:
        yield failed("privileges", f"{user} lacks {_listed(missing)}", grant)
    elif needless:
        other = "as the owner of the tables: `loader init --role analytics_loader`, and load as that role"
        yield warning(
            "privileges", f"{user} has more privileges than loading needs: {_listed(needless)}", other
        )
    elif may_use_plpgsql:
        yield ok("privileges", f"{user} has exactly the privileges needed for loading")


def _listed(privileges: dict[str, list[str]]) -> str:
    return ", ".join(f"{privilege} on {' and '.join(tables)}" for privilege, tables in privileges.items())


def _creators(connection: Connection) -> Iterator[Finding]:
    """Report other roles that may create objects in the schema, such as functions that shadow the system's."""
    creators = connection.execute(_CREATORS).fetchall()
    for name, creator in creators:
        role = creator if creator == "PUBLIC" else f'"{creator}"'
        yield warning(
            "creators", f"{creator} may create objects in the schema {name}",
            f'REVOKE CREATE ON SCHEMA "{name}" FROM {role};',
        )  # fmt: skip
    if not creators:
        yield ok("creators", "only the owner may create objects in the schema of the tables")


def _settings(connection: Connection) -> dict[str, tuple[str, str]]:
    """Return the value and the source of each checked setting."""
    names = [*_UNSAFE_SETTINGS, *_TIMEOUTS, _REPLICATION_ROLE]
    return {name: (value, source) for name, value, source in connection.execute(_SETTINGS, [names])}


def _durability(connection: Connection, found: dict[str, tuple[str, str]]) -> Iterator[Finding]:
    unsafe = [name for name in _UNSAFE_SETTINGS if found.get(name, ("on", ""))[0] == "off"]
    for name in unsafe:
        remedy = _reset(connection, name, found[name][1], "on")
        yield warning("durability", f"{name} is off: {_UNSAFE_SETTINGS[name]}", remedy)
    role, source = found.get(_REPLICATION_ROLE, ("origin", ""))
    if role != "origin":
        yield failed(
            "durability", f"{_REPLICATION_ROLE} is {role}, so foreign keys and triggers are not checked",
            _reset(connection, _REPLICATION_ROLE, source, "origin"),
        )  # fmt: skip
    elif not unsafe:
        yield ok("durability", "committed rows survive a server crash")


def _limits(connection: Connection, found: dict[str, tuple[str, str]], workers: int) -> Iterator[Finding]:
    """Report timeouts that may cancel a load, and connection limits below the number of workers."""
    short = [name for name in _TIMEOUTS if 0 < int(found.get(name, ("0", ""))[0]) < _SHORT_TIMEOUT]
    for name in short:
        value, source = found[name]
        yield warning(
            "limits", f"{name} is {value} ms, which may cancel a load", _reset(connection, name, source, "0")
        )
    user, database = connection.info.user, connection.info.dbname
    ((of_role, of_database),) = connection.execute(_CONNECTION_LIMITS).fetchall()
    few = [
        (f'{kind} "{name}"', limit)
        for kind, name, limit in (("ROLE", user, of_role), ("DATABASE", database, of_database))
        if 0 <= limit < workers
    ]
    for what, limit in few:
        yield warning(
            "limits", f"{what} is limited to {limit} connections, fewer than the {workers} workers",
            f"ALTER {what} CONNECTION LIMIT {workers + 2}; or LOADER_WORKERS={max(limit, 1)}",
        )  # fmt: skip
    if not short and not few:
        yield ok("limits", "no timeout or connection limit affects loading")


def _drops(connection: Connection, stated: Sequence[tuple[Statement, bool]]) -> Iterator[Finding]:
    """Report the lines that emitters dropped in the last day, including those not reported as metrics yet."""
    found = Counter(dropped(connection, "24 hours")) if schema.schema_version(connection) else Counter()
    found.update(unreported(report for statement, _ in stated for report in statement.unreported))
    if not found:
        yield ok("drops", "no line was dropped in the last 24 h")
        return
    shown = ", ".join(f"{kind} {count}" for kind, count in found.most_common(_SHOWN_DROPS))
    more = ", ..." if len(found) > _SHOWN_DROPS else ""
    yield warning(
        "drops", f"emitters dropped {found.total()} lines in the last 24 h: {shown}{more}",
        "see the warnings \"analytics line dropped\" in the application's log",
    )  # fmt: skip


def _conservation(
    connection: Connection, spool: Path | None, stated: Sequence[tuple[Statement, bool]]
) -> Iterator[Finding]:
    """Compare the writers' accounts with the ledger and the spool; recording them for this is rolled back."""
    if schema.schema_version(connection) < writers.VERSION:
        return
    if not writers.may_record(connection):
        user = connection.info.user
        yield warning(
            "conservation", f"{user} may not record the accounts of writers",
            f"as the owner of the tables: `loader init --role {user}`",
        )  # fmt: skip
        return
    now: list[Stated] | None = None
    with contextlib.suppress(OSError):  # reported by `_permissions`
        if spool is not None:
            now = writer_files.with_unstated(spool, stated, writers.last_loaded(connection))
    with connection.transaction(force_rollback=True):
        if now and connection.execute("SHOW transaction_read_only").fetchone() != ("on",):
            writers.record(connection, now)
        total = writers.conservation(connection)
    equation = (
        f"{total.writers} writers emitted {total.emitted} lines = {total.rows} rows + {total.duplicates} duplicates + "
        f"{total.rejects} rejects + {total.erased} erased + "
        + f"{total.expired} expired + " * (total.expired > 0)
        + f"{total.dropped} dropped + {total.pending} pending"
    )
    if total.holds:
        yield ok("conservation", equation)
        return
    names = list(total.missing_segments) or [
        f"lines of {writer}" for writer in total.unbalanced[:_SHOWN_DROPS]
    ]
    more = f" and {total.missing_segment_count - len(names)} more" * (
        total.missing_segment_count > len(names)
    )
    yield warning(
        "conservation", f"{equation} + {total.missing} missing: {', '.join(names)}{more}",
        "search for these segments in the archive or a backup, and load them with `loader backfill`",
    )  # fmt: skip


def _reset(connection: Connection, name: str, source: str, value: str) -> str:
    """Return the statement that resets a setting at its source, or overrides it for the role."""
    role, database = f'"{connection.info.user}"', f'"{connection.info.dbname}"'
    return {
        "user": f"ALTER ROLE {role} RESET {name};",
        "database user": f"ALTER ROLE {role} IN DATABASE {database} RESET {name};",
        "database": f"ALTER DATABASE {database} RESET {name};",
    }.get(source) or (
        f"ALTER ROLE {role} SET {name} = {value};" if name in _TIMEOUTS or name == "synchronous_commit"
        else f"ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf();"
    )  # fmt: skip
