"""What is wrong, and what to type: checks each thing that a loader depends on, and changes nothing.

It looks into the database with the settings of a load, and at those that the role has by itself.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from grp import getgrgid
from pathlib import Path
from typing import Final

import psycopg
import watchfiles

from loader import settings
from loader.errors import LoaderError, LoginRefusedError, OutOfReachError
from loader.files import lock, nofollow, rejects
from loader.files import writers as writer_files
from loader.files.lock import LOCK, holder, is_foreign, lock_holders
from loader.files.scan import STALE_SECONDS, Adopter, backlog, is_stale, segment_names
from loader.files.writers import Stated
from loader.load import deviations, schema, writers
from loader.load.database import Connection, connect, is_distributed, transaction
from loader.load.deviations import Severity
from loader.load.dropped import dropped, unreported
from loader.load.sqlstate import explain
from loader.operate import unit
from loader.operate.status import reject_counts
from loader.service.daemon import UNWATCHABLE
from spool.account import Statement
from spool.segment import OPEN, SEALED

_OLDEST_SERVER: Final = 13
"""The first with `gen_random_uuid()` of its own; 15 and later are tested."""
_LITTLE_SPACE: Final = 1 << 30
_LITTLE_SHARE: Final = 0.05
_LONG_LAG: Final = 60.0
_CLOCK_SECONDS: Final = 5.0
_SHOWN_DROPS: Final = 5
_SHORT_TIMEOUT: Final = 60_000
"""Milliseconds within which every statement of a load should end, also on a busy server."""
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
    "fsync": "a crash of the server may lose or damage rows that were loaded, and their files are gone",
    "full_page_writes": "a crash of the server may damage tables",
    "synchronous_commit": "a crash of the server may lose rows; the loader sets it to on for itself",
    "autovacuum": "tables grow, and statistics for the planner become old",
}
"""Settings that must not be off, and what happens otherwise."""
_REPLICATION_ROLE: Final = "session_replication_role"
_TIMEOUTS: Final = (
    "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_timeout",
    "idle_session_timeout",
)  # fmt: skip
_IDENTITY_VERSION: Final = 4
"""The first version of the tables that remembers whether an identity is required."""
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
"""Who else may create objects in the schema of the tables."""


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What was looked at, what it is like, and what to do where that is not well."""

    check: str
    verdict: Verdict
    finding: str
    remedy: str = ""
    exit_code: int = LoaderError.exit_code

    def facts(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("check", "verdict", "finding", "remedy")}


def _ok(check: str, finding: str) -> Finding:
    return Finding(check, Verdict.OK, finding)


def _warning(check: str, finding: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARNING, finding, remedy)


def _failed(check: str, finding: str, remedy: str) -> Finding:
    return Finding(check, Verdict.FAILED, finding, remedy)


def examine(spool: Path | None, dsn: str | None, archive: Path | None, workers: int = 2) -> Iterator[Finding]:
    """Check the spool, the machine and the database, as given or set, for a loader with so many workers."""
    known: Path | None = None
    try:
        where = settings.spool_directory(spool)
    except LoaderError as error:
        yield _failed("spool", str(error), "")
    else:
        known = where
        for check in (_permissions, _segments, _lock, _backlog, _rejects, _inotify, _disk):
            yield from _guarded(check, where)
    stated = _statements(known)
    if archive is not None:
        yield from _guarded(_archive, archive)
    try:
        conninfo, source = _database(dsn, known)
        if source:
            yield _ok("settings", f'the DSN is the service\'s, from "{source}"')
        with connect(conninfo) as connection:
            yield _ok("connection", f"{connection.info.user}@{connection.info.host}/{connection.info.dbname}")
            with connection.transaction():
                found = _settings(connection)
            with transaction(connection):
                for inspect in (_server, _clock, _schema, _tables, _identity, _privileges, _creators):
                    yield from inspect(connection)
                if is_distributed(connection):
                    yield from _workers(connection)
                yield from _durability(connection, found)
                yield from _limits(connection, found, workers)
                yield from _drops(connection, stated)
                yield from _conservation(connection, known, stated)
    except (psycopg.Error, LoaderError) as error:
        reason = explain(error)
        remedy = "is the server up, and are host, port, user and password right?"
        unreachable = isinstance(reason, OutOfReachError) and not isinstance(reason, LoginRefusedError)
        yield Finding(
            "connection", Verdict.FAILED, str(reason), remedy if unreachable else "", reason.exit_code
        )


def _database(dsn: str | None, spool: Path | None) -> tuple[str, str]:
    """Return the DSN, and the service's file that it is from, empty for one that was given or set."""
    of_unit = None if settings.has_database(dsn) else unit.database_dsn(spool)
    return of_unit or (settings.database_dsn(dsn), "")


def _guarded(check: Callable[[Path], Iterator[Finding]], path: Path) -> Iterator[Finding]:
    try:
        yield from check(path)
    except (LoaderError, OSError, ValueError) as error:
        yield _failed(check.__name__.strip("_"), str(error), "")


def _permissions(spool: Path) -> Iterator[Finding]:
    status = spool.stat()
    try:
        group = getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    mode = stat.S_IMODE(status.st_mode)
    like = f"{spool}, {settings.owner(status.st_uid)}:{group}, mode {mode:04o}"
    if not os.access(spool, os.R_OK | os.W_OK | os.X_OK):
        me = settings.owner(os.geteuid())
        yield _failed("spool", f"{me} can't read and write {like}", f"usermod -a -G {group} {me}")
    elif mode & 0o007:
        yield _warning("spool", f"others than its owner and group reach {like}", f"chmod o= {spool}")
    elif mode & 0o020 and not mode & stat.S_ISGID:
        yield _warning("spool", f"files get their writer's own group in {like}", f"chmod g+s {spool}")
    else:
        yield _ok("spool", like)


def _segments(spool: Path) -> Iterator[Finding]:
    names = list(segment_names(spool))
    unreadable = [name for name in names if not os.access(spool / name, os.R_OK, follow_symlinks=False)]
    future = [name for name in names if _modified(spool / name) > time.time() + _CLOCK_SECONDS]
    # A busy loader retires segments between the listing and the checks: only what still exists counts.
    unreadable = [name for name in unreadable if os.path.lexists(spool / name)]
    if unreadable:
        remedy = f"chmod g+r {spool}/*{SEALED} {spool}/*{OPEN}, and let writer and loader share a group"
        yield _failed("segments", f"{len(unreadable)} can't be read, as {unreadable[0]}", remedy)
    if future:
        yield _warning("segments", f"{future[0]} is from the future", "timedatectl set-ntp true")
    held = list(_held(spool, names))
    yield from held
    if not unreadable and not future and not held:
        yield _ok("segments", f"{len(names)} can be read")


def _modified(path: Path) -> float:
    """Return when a file was changed last, 0 if it does not exist."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _held(spool: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Open segments that no loader here will seal, or that should have been sealed by now."""
    adopter = Adopter(spool)
    for name in (name for name in names if name.endswith(OPEN)):
        with contextlib.suppress(FileNotFoundError):  # sealed in the meantime
            if reason := adopter.why_not(name):
                yield _warning("segments", f"{name} is not sealed here: {reason}", "")
            elif is_stale(spool / name):
                who = _holders(spool / name)
                like = f"{name} has lines and has not changed for {STALE_SECONDS:.0f} s"
                if who:
                    yield _warning(
                        "segments", f"{like}; process {who} has it locked", f"fuser -v {spool / name}"
                    )
                else:
                    yield _warning(
                        "segments", f"{like}", "`loader run --once` seals it if its writer is dead"
                    )


def _holders(path: Path) -> str:
    try:
        with nofollow.open_file(path) as stream:
            return ", ".join(map(str, lock_holders(stream.fileno())))
    except PermissionError:
        return ""


def _lock(spool: Path) -> Iterator[Finding]:
    who = holder(spool)
    if who is not None and is_foreign(who):
        yield _warning("loader", who, f"fuser -v {spool / LOCK}")
    elif who is None:
        yield _warning("loader", "none runs here", "systemctl start analytics-loader, or `loader run`")
    elif (version := lock.version_of(who)) != lock.installed_version():
        like = f"version {version}" if version else "an older version"
        finding = f"{who}: {like} still runs, and {lock.installed_version()} is installed"
        yield _warning("loader", finding, "systemctl restart analytics-loader")
    else:
        yield _ok("loader", who)


def _backlog(spool: Path) -> Iterator[Finding]:
    waiting = backlog(spool)
    size, age = waiting.sealed_bytes / 1e6, waiting.lag_seconds
    like = f"{waiting.sealed_files} sealed files of {size:.1f} MB, the oldest for {age:.0f} s"
    if waiting.lag_seconds > _LONG_LAG:
        yield _warning("backlog", like, "journalctl -u analytics-loader")
    else:
        yield _ok("backlog", like)


def _rejects(spool: Path) -> Iterator[Finding]:
    where = spool / rejects.DIRECTORY
    if where.exists() and not os.access(where, os.W_OK | os.X_OK):
        yield _failed("rejects", f"{where} can't be written", f"chmod g+rwx {where}, as {_owner_of(where)}")
        return
    count = sum(codes.total() for _, codes in reject_counts(spool))
    if count:
        yield _warning("rejects", f"{count} lines were not loaded", "`loader rejects show`")
    else:
        yield _ok("rejects", "none")


def _owner_of(path: Path) -> str:
    return settings.owner(path.lstat().st_uid)


def _inotify(spool: Path) -> Iterator[Finding]:
    try:
        next(watchfiles.watch(spool, rust_timeout=1, yield_on_timeout=True, recursive=False))
    except UNWATCHABLE as error:
        yield _warning(
            "inotify", f"{spool} can't be watched: {error}", "sysctl -w fs.inotify.max_user_instances=1024 "
            "fs.inotify.max_user_watches=524288; until then it is looked at every few seconds",
        )  # fmt: skip
    else:
        limits = Path("/proc/sys/fs/inotify")
        instances, watches = (
            (limits / f"max_user_{name}").read_text().strip() for name in ("instances", "watches")
        )
        yield _ok("inotify", f"{instances} instances and {watches} watches are allowed")


def _disk(spool: Path) -> Iterator[Finding]:
    space = os.statvfs(spool)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    like = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB are free"
    if free < min(_LITTLE_SPACE, _LITTLE_SHARE * total):
        remedy = "make room, or lower SPOOL_MAX_SPOOL_BYTES; on a full disk the emitter drops and counts"
        yield _warning("disk", like, remedy)
    elif space.f_files and space.f_favail < 1000:
        yield _warning("disk", f"{space.f_favail} inodes are free", "remove files that are not needed")
    else:
        yield _ok("disk", like)


def _archive(archive: Path) -> Iterator[Finding]:
    with nofollow.opened(archive):
        pass
    if os.access(archive, os.W_OK | os.X_OK):
        yield _ok("archive", str(archive))
    else:
        yield _failed(
            "archive", f"{archive} can't be written", f"chown {settings.owner(os.geteuid())} {archive}"
        )


def _server(connection: Connection) -> Iterator[Finding]:
    version = connection.info.server_version // 10000
    row = connection.execute("SHOW transaction_read_only").fetchone()
    if version < _OLDEST_SERVER:
        yield _failed("server", f"PostgreSQL {version} is too old", f"use {_OLDEST_SERVER} or later")
    elif row == ("on",):
        yield _failed("server", "it is read-only", "connect to the primary: target_session_attrs=read-write")
    else:
        yield _ok("server", f"PostgreSQL {version}")


_WORKERS: Final = (
    "SELECT nodename, nodeport, success, result FROM run_command_on_workers("
    "'SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_xacts "
    "WHERE prepared < pg_catalog.now() - interval ''5 minutes''') ORDER BY 1, 2"
)
"""A worker of Citus that died in a COMMIT has transactions whose rows are not visible. Citus ends them within a
minute (citus.recover_2pc_interval)."""


def _workers(connection: Connection) -> Iterator[Finding]:
    """Report workers of Citus that do not answer, or have transactions that were not ended."""
    found = connection.execute(_WORKERS).fetchall()
    for name, port, answers, result in found:
        if not answers:
            yield _failed("workers", f"{name}:{port} does not answer: {result}", "start it; loading waits")
        elif int(result):
            finding = f"{name}:{port} has {result} prepared transactions, whose rows are not visible yet"
            yield _warning("workers", finding, "SELECT recover_prepared_transactions(), as a superuser")
    if not found:
        yield _failed("workers", "Citus has none", "SELECT citus_add_node(...)")
    elif all(answers and not int(result) for _, _, answers, result in found):
        yield _ok("workers", f"{len(found)} answer")


def _clock(connection: Connection) -> Iterator[Finding]:
    begun = time.time()
    ((server,),) = connection.execute(
        "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::float"
    ).fetchall()
    away = server - (begun + time.time()) / 2
    like = f"{abs(away):.1f} s {'before' if away < 0 else 'after'} this machine's"
    if abs(away) > _CLOCK_SECONDS:
        yield _warning("clock", f"the server's is {like}", "timedatectl set-ntp true, on both")
    else:
        yield _ok("clock", "as the server's")


def _schema(connection: Connection) -> Iterator[Finding]:
    version, ours = schema.schema_version(connection), schema.SCHEMA_VERSION
    if not version:
        yield _failed("schema", "the tables do not exist", "`loader init`")
    elif version < ours:
        yield _warning("schema", f"version {version}, this loader's is {ours}", "`loader init`")
    elif version > ours:
        yield _warning("schema", f"version {version}, this loader's is {ours}", "upgrade the loader")
    else:
        yield _ok("schema", f"version {version}")


def _tables(connection: Connection) -> Iterator[Finding]:
    found = deviations.find(connection)
    for each in found:
        report = _warning if each.severity is Severity.RISK else _failed
        yield report("tables", f'"{each.table}" {each.problem}', each.remedy)
    if not found:
        yield _ok("tables", "as the loader needs them")


def _identity(connection: Connection) -> Iterator[Finding]:
    """Report whether events need a user and a family, and whether the table is as was chosen."""
    if schema.schema_version(connection) < _IDENTITY_VERSION:
        return
    ((chosen, required),) = connection.execute(_IDENTITY).fetchall()
    like = f"required by {' and '.join(required)}" if required else "optional"
    if chosen == "optional" and required:
        yield _warning(
            "identity", f"optional was chosen, but it is {like}", "`loader init --optional-identity`"
        )
    elif chosen == "required" and len(required) < len(_IDENTITY_COLUMNS):
        yield _warning(
            "identity", "required was chosen, but the table accepts events without one",
            "`loader init --required-identity`, or --optional-identity",
        )  # fmt: skip
    else:
        remedy = "; events without one become rejects (`loader init --optional-identity` accepts them)"
        yield _ok("identity", like + (remedy if required else ": events may have no user and no family"))


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
    temporary = "SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')"
    if connection.execute(temporary).fetchone() != (True,):
        missing["TEMPORARY"] = ["the database"]
    may_use_plpgsql = connection.execute(_MAY_USE_PLPGSQL).fetchone() == (True,)
    if not may_use_plpgsql:
        yield _failed(
            "privileges", f"{user} may not use the language plpgsql, so lines that are refused are not found",
            f'as a superuser: GRANT USAGE ON LANGUAGE plpgsql TO "{user}";',
        )  # fmt: skip
    grant = f"as the owner of the tables: `loader init --role {user}`"
    if missing:
        yield _failed("privileges", f"{user} lacks {_listed(missing)}", grant)
    elif needless:
        other = "as the owner of the tables: `loader init --role analytics_loader`, and load as that role"
        yield _warning("privileges", f"{user} may do more than load: {_listed(needless)}", other)
    elif may_use_plpgsql:
        yield _ok("privileges", f"{user} may load, and nothing else")


def _listed(privileges: dict[str, list[str]]) -> str:
    return ", ".join(f"{privilege} on {' and '.join(tables)}" for privilege, tables in privileges.items())


def _creators(connection: Connection) -> Iterator[Finding]:
    """Whoever may create functions beside the tables may try to have them called by others."""
    creators = connection.execute(_CREATORS).fetchall()
    for name, creator in creators:
        role = creator if creator == "PUBLIC" else f'"{creator}"'
        yield _warning(
            "creators", f"{creator} may create objects in the schema {name}",
            f'REVOKE CREATE ON SCHEMA "{name}" FROM {role};',
        )  # fmt: skip
    if not creators:
        yield _ok("creators", "only the owner may create objects beside the tables")


def _settings(connection: Connection) -> dict[str, tuple[str, str]]:
    """Return the value and the source of each setting that is checked."""
    names = [*_UNSAFE_SETTINGS, *_TIMEOUTS, _REPLICATION_ROLE]
    return {name: (value, source) for name, value, source in connection.execute(_SETTINGS, [names])}


def _durability(connection: Connection, found: dict[str, tuple[str, str]]) -> Iterator[Finding]:
    unsafe = [name for name in _UNSAFE_SETTINGS if found.get(name, ("on", ""))[0] == "off"]
    for name in unsafe:
        remedy = _reset(connection, name, found[name][1], "on")
        yield _warning("durability", f"{name} is off: {_UNSAFE_SETTINGS[name]}", remedy)
    role, source = found.get(_REPLICATION_ROLE, ("origin", ""))
    if role != "origin":
        yield _failed(
            "durability", f"{_REPLICATION_ROLE} is {role}, so foreign keys and triggers are not checked",
            _reset(connection, _REPLICATION_ROLE, source, "origin"),
        )  # fmt: skip
    elif not unsafe:
        yield _ok("durability", "committed rows survive a crash of the server")


def _limits(connection: Connection, found: dict[str, tuple[str, str]], workers: int) -> Iterator[Finding]:
    """Report what ends statements and sessions, or allows fewer of them than there are workers."""
    short = [name for name in _TIMEOUTS if 0 < int(found.get(name, ("0", ""))[0]) < _SHORT_TIMEOUT]
    for name in short:
        value, source = found[name]
        yield _warning(
            "limits", f"{name} is {value} ms, which may end a load", _reset(connection, name, source, "0")
        )
    user, database = connection.info.user, connection.info.dbname
    ((of_role, of_database),) = connection.execute(_CONNECTION_LIMITS).fetchall()
    few = [
        (f'{kind} "{name}"', limit)
        for kind, name, limit in (("ROLE", user, of_role), ("DATABASE", database, of_database))
        if 0 <= limit < workers
    ]
    for what, limit in few:
        yield _warning(
            "limits", f"{what} may have {limit} connections, fewer than the {workers} workers",
            f"ALTER {what} CONNECTION LIMIT {workers + 2}; or LOADER_WORKERS={max(limit, 1)}",
        )  # fmt: skip
    if not short and not few:
        yield _ok("limits", "no timeout and no connection limit is in the way")


def _statements(spool: Path | None) -> list[tuple[Statement, bool]]:
    with contextlib.suppress(OSError):  # which `_permissions` reports
        return writer_files.statements(spool) if spool is not None else []
    return []


def _drops(connection: Connection, stated: Sequence[tuple[Statement, bool]]) -> Iterator[Finding]:
    """Report the lines that emitters dropped in the last day, also those that are in no metric yet."""
    found = Counter(dropped(connection, "24 hours")) if schema.schema_version(connection) else Counter()
    found.update(unreported(report for statement, _ in stated for report in statement.unreported))
    if not found:
        yield _ok("drops", "no line was dropped in the last 24 h")
        return
    shown = ", ".join(f"{kind} {count}" for kind, count in found.most_common(_SHOWN_DROPS))
    more = ", ..." if len(found) > _SHOWN_DROPS else ""
    yield _warning(
        "drops", f"emitters dropped {found.total()} lines in the last 24 h: {shown}{more}",
        "see the warnings \"analytics line dropped\" in the application's log",
    )  # fmt: skip


def _conservation(
    connection: Connection, spool: Path | None, stated: Sequence[tuple[Statement, bool]]
) -> Iterator[Finding]:
    """Compare what writers state with the ledger and the spool; what is recorded for that is rolled back."""
    if schema.schema_version(connection) < writers.VERSION:
        return
    if not writers.may_record(connection):
        user = connection.info.user
        yield _warning(
            "conservation", f"{user} may not record what writers state",
            f"as the owner of the tables: `loader init --role {user}`",
        )  # fmt: skip
        return
    now: list[Stated] | None = None
    with contextlib.suppress(OSError):  # which `_permissions` reports
        if spool is not None:
            now = writer_files.with_unstated(spool, stated, writers.last_loaded(connection))
    with connection.transaction(force_rollback=True):
        if now and connection.execute("SHOW transaction_read_only").fetchone() != ("on",):
            writers.record(connection, now)
        total = writers.conservation(connection)
    equation = (
        f"{total.writers} writers emitted {total.emitted} lines = {total.rows} rows + {total.duplicates} duplicates + "
        f"{total.rejects} rejects + {total.dropped} dropped + {total.pending} pending"
    )
    if total.holds:
        yield _ok("conservation", equation)
        return
    names = list(total.missing_segments) or [
        f"lines of {writer}" for writer in total.unbalanced[:_SHOWN_DROPS]
    ]
    more = f" and {total.missing_segment_count - len(names)} more" * (
        total.missing_segment_count > len(names)
    )
    yield _warning(
        "conservation", f"{equation} + {total.missing} missing: {', '.join(names)}{more}",
        "look for these segments in the archive or a backup and load them with `loader backfill`",
    )  # fmt: skip


def _reset(connection: Connection, name: str, source: str, value: str) -> str:
    """Return the statement that removes a setting where it was made, or overrides it for the role."""
    role, database = f'"{connection.info.user}"', f'"{connection.info.dbname}"'
    return {
        "user": f"ALTER ROLE {role} RESET {name};",
        "database user": f"ALTER ROLE {role} IN DATABASE {database} RESET {name};",
        "database": f"ALTER DATABASE {database} RESET {name};",
    }.get(source) or (
        f"ALTER ROLE {role} SET {name} = {value};" if name in _TIMEOUTS or name == "synchronous_commit"
        else f"ALTER SYSTEM SET {name} = {value}; SELECT pg_reload_conf();"
    )  # fmt: skip
