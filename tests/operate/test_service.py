"""The daemon under a simulated systemd (a socket): its notifications, and that it stops in time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from loader.demo import embedded
from loader.files.limits import CHUNK_BYTES
from loader.load.counts import Counts, Loaded
from loader.load.database import Connection
from loader.service.health import Health
from loader.service.summary import Summary
from spool import Emitter
from tests.load.lines import event, number, rejected, segment, waits_for_events
from tests.processes import HANGS_AFTER, LOADER, Cli, as_root, eventually, slowness

EVENTS = "SELECT count(*) FROM analytics_events"
WATCHDOG_SECONDS = 2.0
STOP_SECONDS = 10.0


class Systemd:
    """The socket, the received messages, and the daemon that sends them."""

    def __init__(self, cli: Cli, line: socket.socket, *arguments: str) -> None:
        interval = str(int(WATCHDOG_SECONDS * 1e6))
        variables = {"NOTIFY_SOCKET": str(line.getsockname()), "WATCHDOG_USEC": interval}
        self._line = line
        self.log = cli.spool.parent / "log"
        self.messages: list[str] = []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*LOADER, "run", *arguments], env=cli.environment | variables, stderr=log
            )

    def read(self, seconds: float = 0.0) -> list[str]:
        """Return the lines received since the last call, waiting for the first."""
        new: list[str] = []
        self._line.settimeout(seconds or None)
        try:
            while True:
                new += self._line.recv(4096).decode().splitlines()
                self._line.settimeout(0.01)
        except (TimeoutError, BlockingIOError):
            self.messages += new
            return new

    def during(self, seconds: float) -> list[str]:
        """Return the lines received in the given time."""
        until, new = time.monotonic() + seconds, []
        while (left := until - time.monotonic()) > 0:
            new += self.read(left)
        return new

    def until(self, words: str, seconds: float = HANGS_AFTER) -> None:
        eventually(lambda: any(words in message for message in [*self.messages, *self.read(0.2)]), seconds)

    def stop(self) -> float:
        """Stop it as systemd does; return the duration, scaled to an idle processor."""
        begun = time.monotonic()
        self.process.terminate()
        assert self.process.wait(timeout=STOP_SECONDS * slowness()) == 0
        return (time.monotonic() - begun) / slowness()


@contextmanager
def under_systemd(cli: Cli, *arguments: str) -> Iterator[Systemd]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(cli.spool.parent / "notify"))
        systemd = Systemd(cli, line, *arguments)
        try:
            yield systemd
        finally:
            systemd.process.kill()
            systemd.process.wait()


def backend(connection: Connection) -> int:
    """Return the pid of the server process that works for the loader in this database."""
    busy = (
        "SELECT max(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'analytics-loader' AND state = 'active'"
    )
    return eventually(lambda: number(connection, busy))


def test_it_is_ready_after_the_first_scan_with_a_connection(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, event(1))
    with under_systemd(cli) as systemd:
        systemd.until("READY=1")
        before = systemd.messages[: systemd.messages.index("READY=1")]
        assert any(message.startswith("STATUS=") for message in before)
        systemd.until("STATUS=no backlog")
        assert number(one_connection, EVENTS) == 1
        systemd.stop()
        systemd.until("STOPPING=1")
        assert systemd.messages.count("READY=1") == 1


def test_the_daemon_waits_for_an_unavailable_database_and_its_status_reports_it(
    cli: Cli, tmp_path: Path
) -> None:
    cli.environment["LOADER_DSN"] = f"host={tmp_path} dbname=x user=u password=sesame"
    with under_systemd(cli) as systemd:
        systemd.until("READY=1")
        status = next(message for message in systemd.messages if message.startswith("STATUS="))
        assert status.startswith("STATUS=waiting: the database is out of reach")
        assert systemd.messages.index(status) < systemd.messages.index("READY=1")
        systemd.messages.clear()
        systemd.until("WATCHDOG=1")  # a waiting loader is alive
        assert systemd.stop() < STOP_SECONDS / 2
    log = systemd.log.read_text()
    assert "sesame" not in log + "".join(systemd.messages) and "loading continues" not in log


def test_an_outage_at_the_start_is_over_once_the_database_answers(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text("host=/nowhere dbname=x")
    good = cli.environment.pop("LOADER_DSN")
    cli.environment["LOADER_DSN_FILE"] = str(file)
    with under_systemd(cli) as systemd:
        systemd.until("STATUS=waiting")
        file.write_text(good)
        systemd.until("STATUS=no backlog")
        systemd.stop()
        assert "loading continues" in systemd.log.read_text()


def test_status_reports_backlog_rate_and_the_cause_of_a_wait(cli: Cli, one_connection: Connection) -> None:
    with under_systemd(cli) as systemd:
        systemd.until("READY=1")
        with one_connection.transaction():
            one_connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
            segment(cli.spool, 1, *[event(n) for n in range(1000)])
            systemd.until("STATUS=1 files (0.3 MB) wait, the oldest for")
        systemd.until("STATUS=no backlog")
        (cli.spool / "stray.ndjson").write_bytes(b"")
        segment(cli.spool, 2, event(1))
        systemd.until("last error")
        assert "stray.ndjson is skipped" in systemd.messages[-1]


def test_the_watchdog_hears_nothing_while_a_load_hangs(cli: Cli, one_connection: Connection) -> None:
    with under_systemd(cli, "--workers", "1") as systemd:
        systemd.until("WATCHDOG=1")
        with one_connection.transaction():
            one_connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
            segment(cli.spool, 1, event(1))
            eventually(lambda: waits_for_events(one_connection))
            systemd.during(WATCHDOG_SECONDS / 2)
            assert "WATCHDOG=1" not in systemd.during(2 * WATCHDOG_SECONDS)
        systemd.messages.clear()
        systemd.until("WATCHDOG=1")
        eventually(lambda: number(one_connection, EVENTS) == 1)


def test_an_abort_by_the_watchdog_leaves_what_each_thread_was_at_in_the_log(
    cli: Cli, one_connection: Connection
) -> None:
    with under_systemd(cli) as systemd, one_connection.transaction():
        one_connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
        segment(cli.spool, 1, event(1))
        systemd.until("READY=1")
        eventually(lambda: waits_for_events(one_connection))
        systemd.process.send_signal(signal.SIGABRT)
        systemd.process.wait()
        assert "in insert" in systemd.log.read_text() or "in copy" in systemd.log.read_text()


def test_the_watchdog_hears_of_a_load_that_is_slow(cli: Cli, one_connection: Connection) -> None:
    """One batch takes longer than the watchdog interval."""
    one_connection.execute(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(0.004); RETURN NEW; END';"
        "CREATE TRIGGER slow BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION slowly()"
    )
    one_connection.commit()
    lines = [event(n, metadata={"text": "x" * 4000}) for n in range(900)]
    with under_systemd(cli, "--workers", "1") as systemd:
        systemd.until("WATCHDOG=1")
        segment(cli.spool, 1, *lines)
        backend(one_connection)
        assert "WATCHDOG=1" in systemd.during(WATCHDOG_SECONDS)
        assert number(one_connection, EVENTS) == 0
        eventually(lambda: number(one_connection, EVENTS) == len(lines))


def test_sigterm_in_the_middle_of_a_large_chunk_ends_in_time_and_loses_nothing(
    cli: Cli, one_connection: Connection
) -> None:
    lines = [event(n, metadata={"text": "x" * 200}) for n in range(3 * CHUNK_BYTES // 500)]
    segment(cli.spool, 1, *lines)
    with under_systemd(cli, "--workers", "1") as systemd:
        backend(one_connection)
        assert systemd.stop() < STOP_SECONDS
    assert number(one_connection, EVENTS) < len(lines)
    cli("run", "--once")
    assert number(one_connection, EVENTS) == len(lines)
    assert number(one_connection, "SELECT sum(events) FROM analytics_loads") == len(lines)


@as_root
def test_sigterm_while_the_server_is_frozen_ends_in_time_and_loses_nothing(
    cli: Cli, one_connection: Connection
) -> None:
    lines = [event(n, metadata={"text": "x" * 200}) for n in range(CHUNK_BYTES // 500)]
    segment(cli.spool, 1, *lines)
    with under_systemd(cli, "--workers", "1") as systemd:
        frozen = backend(one_connection)
        os.kill(frozen, signal.SIGSTOP)
        try:
            systemd.stop()
        finally:
            os.kill(frozen, signal.SIGCONT)
    cli("run", "--once")
    assert number(one_connection, EVENTS) == len(lines)
    assert number(one_connection, "SELECT count(*) FROM analytics_loads") == 1


def test_sigterm_while_connecting_to_a_host_that_does_not_answer_ends_in_time(cli: Cli) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        cli.environment["LOADER_DSN"] = f"host=127.0.0.1 port={silent.getsockname()[1]} connect_timeout=100"
        segment(cli.spool, 1, event(1))
        with under_systemd(cli) as systemd:
            silent.accept()
            systemd.stop()


def test_sighup_reconnects_with_the_current_dsn(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text("host=/nowhere dbname=x\n")
    good = cli.environment.pop("LOADER_DSN")
    cli.environment["LOADER_DSN_FILE"] = str(file)
    segment(cli.spool, 1, event(1))
    with under_systemd(cli) as systemd:
        systemd.until("STATUS=waiting")
        file.write_text(good)
        systemd.process.send_signal(signal.SIGHUP)
        eventually(lambda: number(one_connection, EVENTS) == 1)
        systemd.messages.clear()
        systemd.process.send_signal(signal.SIGHUP)
        systemd.until("RELOADING=1")
        systemd.until("READY=1")
        assert any(message.startswith("MONOTONIC_USEC=") for message in systemd.messages)
        segment(cli.spool, 2, event(2))
        eventually(lambda: number(one_connection, EVENTS) == 2)


def test_log_lines_are_json_unless_on_a_terminal(cli: Cli) -> None:
    segment(cli.spool, 1, event(1), event(2))
    with under_systemd(cli) as systemd:
        systemd.until("STATUS=no backlog")
        systemd.stop()
        log = [json.loads(line) for line in systemd.log.read_text().splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= set(line) for line in log)
    (loaded,) = [line for line in log if "events" in line]
    assert (loaded["events"], loaded["files"], loaded["level"]) == (2, 1, "INFO")


@pytest.mark.parametrize(
    ("dsn", "level", "expected"),
    [
        ("", "info", {"<4>", "<6>"}),
        ("", "WARNING", {"<4>"}),
        ("", "debug", {"<4>", "<6>", "<7>"}),
        ("u:x@host", "info", {"<3>"}),
    ],
)
def test_lines_for_the_journal_have_a_priority(cli: Cli, dsn: str, level: str, expected: set[str]) -> None:
    """JOURNAL_STREAM identifies the journal by device and inode; here it is a file."""
    path = segment(cli.spool, 1, event(1))
    (cli.spool / "stray.ndjson").write_bytes(b"")
    log = cli.spool.parent / "journal"
    with log.open("wb") as stream:
        status = os.fstat(stream.fileno())
        cli.environment["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        cli.environment |= {"LOADER_LOG_LEVEL": level, "LOADER_DSN": dsn or cli.dsn}
        process = subprocess.Popen([*LOADER, "run"], env=cli.environment, stderr=stream)
        eventually(lambda: not path.exists() or process.poll() is not None)
        process.terminate()
        process.wait()
    lines = log.read_text().splitlines()
    assert {line[:3] for line in lines} == expected, lines
    assert cli("run", "--log-level", "x", code=2).startswith(
        "Error: "
    )  # a different stream is not the journal


def test_a_summary_is_logged_once_a_minute_if_anything_was_loaded(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loader")
    health = Health()
    summary, waiting = Summary(spool, health, 0.0), Summary(spool, health)
    summary.tick()
    for _ in range(2):
        health.loaded(Loaded(Counts(2, 1, 0, 1)), 0.1)
        health.files_done(1)
    waiting.tick()
    assert not caplog.messages
    summary.tick()
    summary.tick()
    (line,) = caplog.messages
    assert line.startswith("2 files in 0 s: 6 rows (4 events, 2 metrics), 0 duplicates, 2 rejected")


@contextmanager
def asking_for_a_password() -> Iterator[str]:
    """Yield the DSN of a separate server that accepts only the password "right"."""
    with embedded.cluster() as cluster:
        home = Path(str(conninfo_to_dict(cluster.dsn)["host"]))
        (home / "data" / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        Cli(home, cluster.dsn)("init", "--role", "analytics_loader")
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            connection.execute("ALTER ROLE analytics_loader PASSWORD 'right'")
            connection.execute("SELECT pg_reload_conf()")
        yield make_conninfo(cluster.dsn, user="analytics_loader")


def test_a_refused_login_is_reported_as_such_and_once(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    del cli.environment["LOADER_DSN"]
    cli.environment["LOADER_DSN_FILE"] = str(file)
    with asking_for_a_password() as dsn:
        file.write_text(f"{dsn} password=wrong")
        segment(cli.spool, 1, event(1))
        with closing(Emitter(cli.spool)), under_systemd(cli) as systemd:  # its account is due, too
            systemd.until("STATUS=waiting: the database refused the login")
            systemd.during(2.0)  # time for some more attempts
            for other in ("", "password=right dbname=none"):
                expected = {"": "no password supplied"}.get(other, "none")
                printed = cli("init", "--dsn", f"{dsn} {other}", code=4)
                assert (
                    "refused the login" in printed and expected in printed and "out of reach" not in printed
                )
            file.write_text(f"{dsn} password=right")
            systemd.process.send_signal(signal.SIGHUP)
            systemd.until("STATUS=no backlog")
            systemd.stop()
    log = systemd.log.read_text()
    assert (
        log.count("password authentication failed") == 1 and log.count("check the user and the password") == 1
    )
    assert "out of reach" not in log and log.count("loading continues") == 1


def test_no_password_is_shown_anywhere(cli: Cli, tmp_path: Path) -> None:
    for dsn in (
        "postgresql://u:sesame@127.0.0.1:1/x", "postgresql://u:ses/sesame@host/x", "u:sesame@host",
        "host=127.0.0.1 port=1 password=sesame", "password='sesame", "host=h port=sesame",
    ):  # fmt: skip
        variables = {"LOADER_DSN": dsn}
        for command in (["status"], ["status", "--json"], ["doctor"], ["run", "--once"], ["init"]):
            ended = cli.run(*command, variables=variables)
            assert ended.returncode in (1, 2, 4), ended.stderr
            assert b"sesame" not in ended.stdout + ended.stderr


def test_a_reboot_leaves_nothing_that_keeps_it_from_starting(cli: Cli, tmp_path: Path) -> None:
    """SIGKILL of emitter, loader and server at once leaves lock files and unfinished files."""
    emitter = (
        "import sys, uuid\nfrom spool import Emitter\nemitter = Emitter(sys.argv[1], segment_bytes=65536)\n"
        "user = uuid.uuid4()\nwhile True:\n"
        " print(emitter.emit_event(event_type='tick', user_id=user, family_unit_id=user), flush=True)"
    )
    with embedded.cluster() as cluster:
        owner = Cli(cli.spool, cluster.dsn)
        owner("init", "--role", "analytics_loader")
        loader = Cli(cli.spool, f"{cluster.dsn} user=analytics_loader")
        with (tmp_path / "acknowledged").open("wb") as acknowledged:
            application = subprocess.Popen(
                [LOADER[0], "-c", emitter, cli.spool], env=loader.environment, stdout=acknowledged
            )
        with psycopg.connect(cluster.dsn) as connection, loader.daemon() as process:
            eventually(lambda: number(connection, EVENTS) > 500)
            for pid in (application.pid, process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            application.wait()
        cluster.stop(signal.SIGKILL)
        (cli.spool / "rejected").mkdir(exist_ok=True)
        (cli.spool / "rejected" / "x-0.part").write_bytes(b'{"cut')
        assert (cli.spool / ".loader.lock").exists() and list(cli.spool.glob("*.open"))
        cluster.start()
        ids = (tmp_path / "acknowledged").read_text().splitlines()[:-1]  # the last line may be partial
        with loader.daemon(), psycopg.connect(cluster.dsn) as connection:
            found = f"{EVENTS} WHERE event_id::text = ANY(ARRAY{ids}::text[])"
            eventually(lambda: number(connection, found) == len(ids))
            assert not rejected(cli.spool)
