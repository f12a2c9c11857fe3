"""`loader doctor`: checks everything that a loader depends on, and suggests remedies. Changes nothing.

The database is checked in doctor_database.py, its layout in doctor_layout.py.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
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
from loader.load.database import connect
from loader.load.sqlstate import explain
from loader.operate import doctor_database, unit
from loader.operate.finding import Finding, Verdict, failed, ok, warning
from loader.operate.status import reject_counts
from loader.service.daemon import UNWATCHABLE
from spool.account import Statement
from spool.segment import OPEN, SEALED

_LITTLE_SPACE: Final = 1 << 30
_LITTLE_SHARE: Final = 0.05
_LONG_LAG: Final = 60.0
_CLOCK_SECONDS: Final = 5.0


def examine(spool: Path | None, dsn: str | None, archive: Path | None, workers: int = 2) -> Iterator[Finding]:
    """Check the spool, the machine and the database (as given or from the environment) for a loader."""
    known: Path | None = None
    try:
        where = settings.spool_directory(spool)
    except LoaderError as error:
        yield failed("spool", str(error), "")
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
            yield ok("settings", f'the DSN is the service\'s, from "{source}"')
        with connect(conninfo) as connection:
            yield ok("connection", f"{connection.info.user}@{connection.info.host}/{connection.info.dbname}")
            yield from doctor_database.examine(connection, known, stated, workers)
    except (psycopg.Error, LoaderError) as error:
        reason = explain(error)
        remedy = "is the server up, and are host, port, user and password right?"
        unreachable = isinstance(reason, OutOfReachError) and not isinstance(reason, LoginRefusedError)
        yield Finding(
            "connection", Verdict.FAILED, str(reason), remedy if unreachable else "", reason.exit_code
        )


def _database(dsn: str | None, spool: Path | None) -> tuple[str, str]:
    """Return the DSN, and the service's file that contains it, or "" if it was given or is in the environment."""
    of_unit = None if settings.has_database(dsn) else unit.database_dsn(spool)
    return of_unit or (settings.database_dsn(dsn), "")


def _guarded(check: Callable[[Path], Iterator[Finding]], path: Path) -> Iterator[Finding]:
    try:
        yield from check(path)
    except (LoaderError, OSError, ValueError) as error:
        yield failed(check.__name__.strip("_"), str(error), "")


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
        yield failed("spool", f"{me} cannot read and write {like}", f"usermod -a -G {group} {me}")
    elif mode & 0o007:
        yield warning(
            "spool", f"other users than its owner and group have access to {like}", f"chmod o= {spool}"
        )
    elif mode & 0o020 and not mode & stat.S_ISGID:
        yield warning(
            "spool", f"new files get the primary group of their writer in {like}", f"chmod g+s {spool}"
        )
    else:
        yield ok("spool", like)


def _segments(spool: Path) -> Iterator[Finding]:
    names = list(segment_names(spool))
    unreadable = [name for name in names if not os.access(spool / name, os.R_OK, follow_symlinks=False)]
    future = [name for name in names if _modified(spool / name) > time.time() + _CLOCK_SECONDS]
    # A busy loader retires segments between the listing and the checks: only existing ones count.
    unreadable = [name for name in unreadable if os.path.lexists(spool / name)]
    if unreadable:
        remedy = f"chmod g+r {spool}/*{SEALED} {spool}/*{OPEN}, and let writer and loader share a group"
        yield failed("segments", f"{len(unreadable)} cannot be read, such as {unreadable[0]}", remedy)
    if future:
        yield warning(
            "segments", f"{future[0]} has a modification time in the future", "timedatectl set-ntp true"
        )
    held = list(_held(spool, names))
    yield from held
    if not unreadable and not future and not held:
        yield ok("segments", f"{len(names)} readable")


def _modified(path: Path) -> float:
    """Return the modification time of a file, or 0 if it does not exist."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _held(spool: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Report open segments that no loader here will seal, or that should have been sealed by now."""
    adopter = Adopter(spool)
    for name in (name for name in names if name.endswith(OPEN)):
        with contextlib.suppress(FileNotFoundError):  # sealed in the meantime
            if reason := adopter.why_not(name):
                yield warning("segments", f"{name} is not sealed here: {reason}", "")
            elif is_stale(spool / name):
                who = _holders(spool / name)
                like = f"{name} has lines, but has not changed for {STALE_SECONDS:.0f} s"
                if who:
                    yield warning("segments", f"{like}; locked by process {who}", f"fuser -v {spool / name}")
                else:
                    yield warning("segments", f"{like}", "`loader run --once` seals it if its writer is dead")


def _holders(path: Path) -> str:
    try:
        with nofollow.open_file(path) as stream:
            return ", ".join(map(str, lock_holders(stream.fileno())))
    except PermissionError:
        return ""


def _lock(spool: Path) -> Iterator[Finding]:
    who = holder(spool)
    if who is not None and is_foreign(who):
        yield warning("loader", who, f"fuser -v {spool / LOCK}")
    elif who is None:
        yield warning(
            "loader", "not running on this machine", "systemctl start analytics-loader, or `loader run`"
        )
    elif (version := lock.version_of(who)) != lock.installed_version():
        like = f"version {version}" if version else "an older version"
        finding = f"{who}: {like} is running, but {lock.installed_version()} is installed"
        yield warning("loader", finding, "systemctl restart analytics-loader")
    else:
        yield ok("loader", who)


def _backlog(spool: Path) -> Iterator[Finding]:
    waiting = backlog(spool)
    size, age = waiting.sealed_bytes / 1e6, waiting.lag_seconds
    like = f"{waiting.sealed_files} sealed files of {size:.1f} MB, the oldest for {age:.0f} s"
    if waiting.lag_seconds > _LONG_LAG:
        yield warning("backlog", like, "journalctl -u analytics-loader")
    else:
        yield ok("backlog", like)


def _rejects(spool: Path) -> Iterator[Finding]:
    where = spool / rejects.DIRECTORY
    if where.exists() and not os.access(where, os.W_OK | os.X_OK):
        yield failed("rejects", f"{where} is not writable", f"chmod g+rwx {where}, as {_owner_of(where)}")
        return
    count = sum(codes.total() for _, codes in reject_counts(spool))
    if count:
        yield warning("rejects", f"{count} rejected lines", "`loader rejects show`")
    else:
        yield ok("rejects", "none")


def _owner_of(path: Path) -> str:
    return settings.owner(path.lstat().st_uid)


def _inotify(spool: Path) -> Iterator[Finding]:
    try:
        next(watchfiles.watch(spool, rust_timeout=1, yield_on_timeout=True, recursive=False))
    except UNWATCHABLE as error:
        yield warning(
            "inotify", f"cannot watch {spool}: {error}", "sysctl -w fs.inotify.max_user_instances=1024 "
            "fs.inotify.max_user_watches=524288; until then the spool is scanned every few seconds",
        )  # fmt: skip
    else:
        limits = Path("/proc/sys/fs/inotify")
        instances, watches = (
            (limits / f"max_user_{name}").read_text().strip() for name in ("instances", "watches")
        )
        yield ok("inotify", f"limits: {instances} instances, {watches} watches")


def _disk(spool: Path) -> Iterator[Finding]:
    space = os.statvfs(spool)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    like = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free"
    if free < min(_LITTLE_SPACE, _LITTLE_SHARE * total):
        remedy = "free disk space, or lower SPOOL_MAX_SPOOL_BYTES; on a full disk the emitter drops and counts lines"
        yield warning("disk", like, remedy)
    elif space.f_files and space.f_favail < 1000:
        yield warning("disk", f"{space.f_favail} inodes free", "remove unneeded files")
    else:
        yield ok("disk", like)


def _archive(archive: Path) -> Iterator[Finding]:
    with nofollow.opened(archive):
        pass
    if os.access(archive, os.W_OK | os.X_OK):
        yield ok("archive", str(archive))
    else:
        yield failed(
            "archive", f"{archive} is not writable", f"chown {settings.owner(os.geteuid())} {archive}"
        )


def _statements(spool: Path | None) -> list[tuple[Statement, bool]]:
    with contextlib.suppress(OSError):  # reported by `_permissions`
        return writer_files.statements(spool) if spool is not None else []
    return []
