"""`loader doctor` finds each problem, suggests a command, and changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from loader.errors import UsageError
from loader.load.database import Connection
from loader.operate import doctor, unit
from tests.load.lines import STEM, event, joined, segment
from tests.processes import (
    LOADER,
    Cli,
    as_another_user,
    as_root,
    eventually,
    failing,
    needs_strace,
    reachable_by_others,
)


def examined(cli: Cli, *arguments: str, code: int = 0) -> dict[str, dict[str, str]]:
    printed = cli("doctor", "--json", *arguments, code=code)
    return {finding["check"]: finding for finding in json.loads(printed.splitlines()[0])}


def test_all_is_well_while_a_loader_runs_as_its_own_role(cli: Cli) -> None:
    cli.spool.chmod(0o2770)
    with cli.daemon():
        eventually(lambda: (cli.spool / ".loader.lock").exists())
        eventually(lambda: "pid" in cli("doctor"))
        findings = examined(cli)
    durability = findings.pop("durability")  # the test servers run without fsync
    assert durability["verdict"] == "warning" and "full_page_writes is off" in durability["finding"]
    assert {finding["verdict"] for finding in findings.values()} == {"ok"}, findings
    assert set(findings) == {
        "spool", "segments", "loader", "backlog", "rejects", "inotify", "disk",
        "connection", "server", "clock", "schema", "tables", "privileges", "creators", "limits", "identity", "drops", "conservation",
        "layout", "rollups",
    }  # fmt: skip


def no_tables(_: Cli, connection: Connection) -> None:
    connection.execute("DROP TABLE analytics_loads, analytics_schema CASCADE")


def older_tables(_: Cli, connection: Connection) -> None:
    connection.execute("DROP TABLE analytics_schema")


def newer_tables(_: Cli, connection: Connection) -> None:
    connection.execute("INSERT INTO analytics_schema (version) VALUES (9)")


def no_privilege(_: Cli, connection: Connection) -> None:
    connection.execute("REVOKE INSERT ON analytics_events FROM analytics_loader")


def too_many_privileges(_: Cli, connection: Connection) -> None:
    connection.execute("GRANT DELETE ON analytics_events TO analytics_loader")


def read_only(_: Cli, connection: Connection) -> None:
    name = connection.info.dbname
    connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())


def no_database(cli: Cli, _: Connection) -> None:
    cli.environment["LOADER_DSN"] = "host=/nowhere"


def no_dsn(cli: Cli, _: Connection) -> None:
    del cli.environment["LOADER_DSN"]


def no_spool(cli: Cli, _: Connection) -> None:
    cli.environment["SPOOL_DIR"] += "/nowhere"


def not_durable(_: Cli, connection: Connection) -> None:
    name = connection.info.dbname
    connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = off".encode())


def without_checks(_: Cli, connection: Connection) -> None:
    role = f"ROLE analytics_loader IN DATABASE {connection.info.dbname}"
    connection.execute(f"ALTER {role} SET session_replication_role = replica".encode())


def no_language(_: Cli, connection: Connection) -> None:
    connection.execute("REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC")


def late_uniqueness(_: Cli, connection: Connection) -> None:
    connection.execute(
        "ALTER TABLE analytics_events DROP CONSTRAINT analytics_events_event_id_key, "
        "ADD CONSTRAINT late UNIQUE (event_id) DEFERRABLE"
    )


def short_timeout(_: Cli, connection: Connection) -> None:
    name = connection.info.dbname
    connection.execute(
        f"ALTER ROLE analytics_loader IN DATABASE {name} SET statement_timeout = '1s'".encode()
    )


def few_connections(cli: Cli, connection: Connection) -> None:
    connection.execute(f"ALTER DATABASE {connection.info.dbname} CONNECTION LIMIT 3".encode())
    cli.environment["LOADER_WORKERS"] = "4"


def open_to_others(cli: Cli, _: Connection) -> None:
    cli.spool.chmod(0o777)


def own_groups(cli: Cli, _: Connection) -> None:
    cli.spool.chmod(0o770)


def rejected_lines(cli: Cli, _: Connection) -> None:
    segment(cli.spool, 1, b"{broken")
    cli("run", "--once", code=3)


def old_backlog(cli: Cli, _: Connection) -> None:
    os.utime(segment(cli.spool, 1, event(1)), (1, 1))


def from_the_future(cli: Cli, _: Connection) -> None:
    os.utime(segment(cli.spool, 1, event(1)), (1e10, 1e10))


def linked_rejects(cli: Cli, _: Connection) -> None:
    (cli.spool / "rejected").symlink_to(cli.spool.parent)


def planted_lock(cli: Cli, _: Connection) -> None:
    (cli.spool / ".loader.lock").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("harm", "check", "verdict", "says"),
    [
        (no_tables, "schema", "failed", "`loader init`"),
        (older_tables, "schema", "warning", "`loader init`"),
        (newer_tables, "schema", "warning", "upgrade the loader"),
        (no_privilege, "privileges", "failed", "`loader init --role analytics_loader`"),
        (too_many_privileges, "privileges", "warning", "DELETE on analytics_events"),
        (read_only, "server", "failed", "target_session_attrs"),
        (not_durable, "durability", "warning", "RESET synchronous_commit"),
        (without_checks, "durability", "failed", "RESET session_replication_role"),
        (no_language, "privileges", "failed", "GRANT USAGE ON LANGUAGE plpgsql TO"),
        (late_uniqueness, "tables", "failed", 'DROP CONSTRAINT "late", ADD UNIQUE (event_id);'),
        (short_timeout, "limits", "warning", "RESET statement_timeout"),
        (few_connections, "limits", "warning", "LOADER_WORKERS=3"),
        (no_database, "connection", "failed", "is the server up"),
        (no_dsn, "connection", "failed", "set LOADER_DSN"),
        (no_spool, "spool", "failed", "create it"),
        (open_to_others, "spool", "warning", "chmod o="),
        (own_groups, "spool", "warning", "chmod g+s"),
        (rejected_lines, "rejects", "warning", "`loader rejects show`"),
        (old_backlog, "backlog", "warning", "journalctl"),
        (from_the_future, "segments", "warning", "timedatectl"),
        (linked_rejects, "rejects", "failed", "move it away"),
        (planted_lock, "lock", "failed", "remove it"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_is_found_and_the_remedy_named(
    cli: Cli, one_connection: Connection, harm: Callable[[Cli, Connection], None],
    check: str, verdict: str, says: str,
) -> None:  # fmt: skip
    harm(cli, one_connection)
    one_connection.commit()
    code = 0 if verdict != "failed" else 4 if harm is no_database else 2 if harm is no_dsn else 1
    finding = examined(cli, code=code)[check]
    assert finding["verdict"] == verdict
    assert says in finding["finding"] + finding["remedy"]


def test_excessive_privileges_of_the_tables_owner_are_reported(cli: Cli) -> None:
    finding = examined(cli.owner())["privileges"]
    assert finding["verdict"] == "warning" and "more privileges than loading needs" in finding["finding"]


@needs_strace
@pytest.mark.parametrize(("call", "error"), [("inotify_add_watch", "ENOSPC"), ("inotify_init1", "EMFILE")])
def test_a_directory_that_cant_be_watched_is_found(cli: Cli, call: str, error: str) -> None:
    command = [*failing(call, error), *LOADER, "doctor"]
    printed = subprocess.run(command, env=cli.environment, capture_output=True, text=True).stdout
    assert "warning  inotify" in printed and "do: sysctl -w fs.inotify" in printed


@as_root
def test_rejects_that_cant_be_written_are_found(tmp_path: Path) -> None:
    reachable_by_others(tmp_path)
    (tmp_path / "rejected").mkdir(mode=0o755)

    def examine() -> None:
        findings = {finding.check: finding for finding in doctor.examine(tmp_path, "host=/nowhere", None)}
        assert findings["rejects"].verdict == "failed" and "chmod g+rwx" in findings["rejects"].remedy

    assert as_another_user(examine) == 0


def test_the_doctor_changes_nothing(cli: Cli) -> None:
    (cli.spool / f"{STEM.format(1)}.open").write_bytes(b"\0" * 100)
    segment(cli.spool, 2, event(1))
    before = {path.name: path.stat().st_mtime_ns for path in cli.spool.iterdir()}
    cli("doctor")
    assert {path.name: path.stat().st_mtime_ns for path in cli.spool.iterdir()} == before


BUSY_SECONDS = 10.0
"""Seconds that the commands are repeated beside a daemon."""


def test_nothing_is_wrong_beside_a_daemon_that_is_busy(cli: Cli, one_connection: Connection) -> None:
    """Files are sealed, retired, rejected and retried all the time; no command reports that as a problem."""
    cli.spool.chmod(0o2770)
    stop = threading.Event()

    def emit() -> None:
        for n in itertools.count(1):  # without a gap, because a missing segment is reported
            while len(os.listdir(cli.spool)) > 500 and not stop.is_set():
                stop.wait(0.01)
            if stop.is_set():
                return
            path = cli.spool / f"{STEM.format(n)}.ndjson"
            path.with_suffix(".new").write_bytes(joined(event(n), *[b"{broken"] * (n % 3 == 0)))
            path.with_suffix(".new").rename(path)
            (cli.spool / f"{STEM.format(n + 1)}.open").touch()
            for reject in (cli.spool / "rejected").glob("*.ndjson") if n % 50 == 0 else ():
                reject.unlink(missing_ok=True)

    emitting = threading.Thread(target=emit)
    with cli.daemon():
        eventually(lambda: "pid" in cli("status"))
        emitting.start()
        try:
            until = time.monotonic() + BUSY_SECONDS
            while time.monotonic() < until:
                findings = examined(cli)
                for check in ("durability", "rejects"):
                    findings.pop(check)  # the test servers run without fsync; there are rejects
                unwell = [finding for finding in findings.values() if finding["verdict"] != "ok"]
                assert not unwell
                for command in ("status", "rejects list", "rejects show"):
                    cli(*command.split(), "--json")
        finally:
            stop.set()
            emitting.join()


@pytest.mark.parametrize("left", ["pid {} on host\n", "pid {} on host, version 0.0.1\n"])
def test_an_old_version_that_still_runs_after_an_upgrade_is_noticed(cli: Cli, left: str) -> None:
    lock = cli.spool / ".loader.lock"
    with cli.daemon() as process:
        eventually(
            lambda: lock.exists() and lock.read_text().endswith(f", version {version('analytics-spool')}\n")
        )
        assert examined(cli)["loader"]["verdict"] == "ok"
        lock.write_text(left.format(process.pid))  # as written by the previous release
        finding = examined(cli)["loader"]
        assert finding["verdict"] == "warning" and "restart" in finding["remedy"]
        assert "is running, but" in finding["finding"] and version("analytics-spool") in finding["finding"]


@pytest.mark.parametrize(
    ("files", "spool", "expected"),
    [
        ({"environment": "# a remark\nLOADER_DSN=host=/a\n", "dsn": "host=/b"}, "analytics", "host=/a"),
        ({"environment": "LOADER_DSN='host=/a dbname=x'\n"}, "spool", "dbname=x"),
        ({"environment": "PGHOST=/c\n", "dsn": "host=/b\n"}, "analytics", "host=/b"),
        ({"environment": "LOADER_WORKERS=2\nPGHOST=/c\n", "dsn": "\n"}, "analytics", ""),
        ({"photos.dsn": "host=/p", "dsn": "host=/b"}, "analytics-photos", "host=/p"),
        ({"photos.dsn": "host=/p"}, "analytics", None),
    ],
)
def test_the_database_of_the_service_is_found(
    tmp_path: Path, files: dict[str, str], spool: str, expected: str | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = unit.database_dsn(Path("/var/spool") / spool, tmp_path)
    assert found is None if expected is None else found and expected in found[0]


@as_root
def test_a_file_of_the_service_that_may_not_be_read_is_named_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "dsn").write_text("host=/a")
    (tmp_path / "dsn").chmod(0o600)
    reachable_by_others(tmp_path)

    def look() -> None:
        with pytest.raises(
            UsageError, match=r'nobody cannot read the settings.*".*/dsn".*sudo loader doctor'
        ):
            unit.database_dsn(None, tmp_path)

    assert as_another_user(look) == 0


@as_root
def test_doctor_takes_the_database_of_the_service_if_none_is_set(cli: Cli, tmp_path: Path) -> None:
    """In a separate mount namespace, in which the test's directory is /etc."""
    (tmp_path / "etc" / "analytics-loader").mkdir(parents=True)
    (tmp_path / "etc" / "analytics-loader" / "dsn").write_text(cli.dsn)
    del cli.environment["LOADER_DSN"]
    script = f'mount --bind {tmp_path}/etc /etc && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *LOADER, "doctor"]
    ended = subprocess.run(command, env=cli.environment, capture_output=True, text=True)
    assert 'from "/etc/analytics-loader/dsn"' in ended.stdout, ended.stdout + ended.stderr
    assert "ok       connection" in ended.stdout
