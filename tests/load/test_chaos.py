"""Emitters, a loader and Postgres are killed, disconnected, locked out, refused, timed out or left without
disk\nspace at random moments. In the end every event whose emit returned is a row, and the ledger matches the table.

The seed is printed; SEED in the environment repeats a run's choices (not its timing).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from loader.demo import embedded
from loader.load import schema
from tests import disks
from tests.disks import fill
from tests.load.lines import ledger_agrees, rejected
from tests.processes import LOADER, Cli, environment

EMITTER = """
import os, sys, time, uuid
from spool import Emitter
emitter = Emitter(sys.argv[1], max_age=0.05, segment_bytes=65536)
acknowledged = os.open(sys.argv[2], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
user = uuid.uuid4()
while True:
    made = emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user)
    if made is not None:
        os.write(acknowledged, made.encode() + b"\\n")
    time.sleep(0.0005)  # some 2,000 events a second, not as many as possible
"""
SETTLE_SECONDS = 0.4
"""Maximum duration of a fault before it is repaired."""
ROLE = "chaos_loader"


class Chaos:
    """The running processes, and the possible faults. After each fault everything runs again, but is not idle."""

    def __init__(self, cluster: embedded.Cluster, spool: Path, home: Path, seed: int) -> None:
        self.cluster = cluster
        self.chance = random.Random(seed)
        self.spool = spool
        self.home = home
        self.dsn = f"{cluster.dsn} user={ROLE}"
        self.log = (home / "loader.log").open("ab")
        self.acknowledged: list[Path] = []
        self.emitters = [self.emitter() for _ in range(2)]
        self.loader = self.start_loader()

    def emitter(self) -> subprocess.Popen[bytes]:
        self.acknowledged.append(self.home / f"acknowledged-{len(self.acknowledged)}")
        return subprocess.Popen([sys.executable, "-c", EMITTER, self.spool, self.acknowledged[-1]])

    def start_loader(self) -> subprocess.Popen[bytes]:
        workers = str(self.chance.randint(1, 4))
        variables = environment(SPOOL_DIR=str(self.spool), LOADER_DSN=self.dsn, LOADER_WORKERS=workers)
        return subprocess.Popen([*LOADER, "run"], env=variables, stderr=self.log)

    def pause(self) -> None:
        """Let everything run for a random time, to randomize the moment of the next fault."""
        time.sleep(self.chance.random() * SETTLE_SECONDS)

    def admin(self, *statements: str) -> None:
        with psycopg.connect(self.cluster.dsn, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    # ---- faults -------------------------------------------------------------------------------------

    def kill_an_emitter(self) -> None:
        place = self.chance.randrange(len(self.emitters))
        self.emitters[place].kill()
        self.emitters[place].wait()
        self.emitters[place] = self.emitter()

    def kill_the_loader(self) -> None:
        self.loader.kill()
        self.loader.wait()
        self.loader = self.start_loader()

    def kill_the_server(self) -> None:
        self.cluster.stop(signal.SIGKILL)
        self.pause()
        self.cluster.start()

    def stop_the_server_at_once(self) -> None:
        self.cluster.stop(signal.SIGQUIT)
        self.pause()
        self.cluster.start()

    def terminate_backends(self) -> None:
        self.admin(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'")

    def lock_the_table(self) -> None:
        with psycopg.connect(self.cluster.dsn) as connection:
            connection.execute("LOCK TABLE analytics_events IN ACCESS EXCLUSIVE MODE")
            self.pause()

    @contextmanager
    def of_the_role(self, change: str, undo: str) -> Iterator[None]:
        """Let a change of the role affect all connections of the loader, and revert it after a while."""
        self.admin(f"ALTER ROLE {ROLE} {change}")
        self.terminate_backends()
        yield
        self.pause()
        self.admin(f"ALTER ROLE {ROLE} {undo}")
        self.terminate_backends()

    def refuse_connections(self) -> None:
        with self.of_the_role("CONNECTION LIMIT 0", "CONNECTION LIMIT -1"):
            pass

    def allow_one_connection(self) -> None:
        with self.of_the_role("CONNECTION LIMIT 1", "CONNECTION LIMIT -1"):
            pass

    def make_read_only(self) -> None:
        with self.of_the_role(
            "SET default_transaction_read_only = on", "RESET default_transaction_read_only"
        ):
            pass

    def time_statements_out(self) -> None:
        limit = self.chance.choice((1, 5, 20))
        with self.of_the_role(f"SET statement_timeout = {limit}", "RESET statement_timeout"):
            pass

    def crash_after_commits_that_do_not_wait_for_the_disk(self) -> None:
        with self.of_the_role("SET synchronous_commit = off", "RESET synchronous_commit"):
            self.pause()
            self.kill_the_server()

    def fill_the_disk(self) -> None:
        filler = fill(self.spool)
        self.pause()
        filler.unlink()

    def faults(self) -> list[Callable[[], None]]:
        return [
            self.kill_an_emitter, self.kill_the_loader, self.kill_the_server, self.stop_the_server_at_once,
            self.terminate_backends, self.lock_the_table, self.refuse_connections, self.allow_one_connection,
            self.make_read_only, self.time_statements_out, self.crash_after_commits_that_do_not_wait_for_the_disk,
            *([self.fill_the_disk] if self.spool.is_mount() else []),
        ]  # fmt: skip

    # ---- the end ------------------------------------------------------------------------------------

    def end(self) -> set[str]:
        """Stop everything except the server, load the rest, and return the acknowledged events."""
        for process in (*self.emitters, self.loader):
            process.kill()
            process.wait()
        self.log.close()
        cli = Cli(self.spool, self.dsn)
        cli("run", "--once")
        # A writer killed before it locked its new file leaves the file: it has no line, and loaders ignore
        # its name.
        left = [path for path in self.spool.glob("2*") if path.suffix in (".open", ".ndjson")]
        assert not left, cli("status")
        return {line for path in self.acknowledged if path.exists() for line in path.read_text().splitlines()}


@contextmanager
def spool_directory(where: Path) -> Iterator[Path]:
    """Return a spool on a small disk, if this user may mount one."""
    if os.geteuid() == 0:
        with disks.small_disk(where, "size=16m,mode=770") as disk:
            yield disk
    else:
        where.mkdir()
        yield where


def run(home: Path, faults: int) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    print(f"SEED={seed}")
    with (
        spool_directory(home / "spool") as spool,
        embedded.cluster(max(v for v in (15, 16, 18) if embedded.binaries(v))) as cluster,
    ):
        with psycopg.connect(cluster.dsn) as connection:
            schema.apply_schema(connection, role=ROLE)
        chaos = Chaos(cluster, spool, home, seed)
        for _ in range(faults):
            chaos.pause()
            chaos.chance.choice(chaos.faults())()
        acknowledged = chaos.end()
        with psycopg.connect(cluster.dsn) as connection:
            rows = [str(row[0]) for row in connection.execute("SELECT event_id FROM analytics_events")]
            ledger_agrees(connection, chaos.spool)
    assert not rejected(chaos.spool)
    missing = acknowledged - set(rows)
    assert not missing, f"{len(missing)} of {len(acknowledged)} acknowledged events are missing"
    assert len(acknowledged) > 100 * faults / 10


def test_nothing_acknowledged_is_lost_whatever_is_killed(tmp_path: Path) -> None:
    run(tmp_path, 20)


@pytest.mark.long
def test_nothing_acknowledged_is_lost_in_two_hundred_faults(tmp_path: Path) -> None:
    run(tmp_path, 200)
