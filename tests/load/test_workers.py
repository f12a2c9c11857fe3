"""A worker or batch that cannot proceed does not block the others, and loaders do not block each other."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from loader.errors import OutOfReachError
from loader.load.database import Connection
from loader.load.schema import apply_schema
from loader.service import daemon
from loader.service.signals import Signals
from loader.service.workers import Workers
from tests.load.lines import event, is_number, joined, number, rejected, rows, segment
from tests.load.test_refused import raising
from tests.processes import LOADER, Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"


@pytest.fixture
def role(cli: Cli, one_connection: Connection) -> str:
    """Return the role of the command line, used by no other test."""
    name = "role_" + one_connection.info.dbname[-12:]
    apply_schema(one_connection, role=name)
    one_connection.commit()
    cli.environment["LOADER_DSN"] = make_conninfo(cli.dsn, user=name)
    return name


def many_segments(spool: Path, count: int) -> None:
    """Create more segments than fit into a batch."""
    for n in range(count):
        segment(spool, n + 1, event(n))


def test_a_daemon_with_fewer_connections_than_workers_loads_with_those_it_gets(
    cli: Cli, one_connection: Connection, role: str
) -> None:
    one_connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1".encode())
    one_connection.commit()
    with cli.daemon("--workers", "3") as process:
        log = iter(process.stderr.readline, b"") if process.stderr else iter([])
        for place in range(6):
            for n in range(300):
                segment(cli.spool, place * 300 + n + 1, event(place * 300 + n))
            eventually(partial(is_number, one_connection, EVENTS, 300 * (place + 1)))
        while "loading with 1 of 3 connections" not in next(log).decode():
            segment(cli.spool, 5000, event(5000))
        one_connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1".encode())
        one_connection.commit()

        def loads_with_all() -> bool:
            many_segments(cli.spool, 1)
            seen = "SELECT count(*) FROM pg_stat_activity WHERE usename = " + repr(role)
            return number(one_connection, seen) == 3

        eventually(loads_with_all, 60)
        process.send_signal(signal.SIGTERM)
        rest = b"".join(log).decode()
    assert "loading with 1 of 3" not in rest and "loading with 3 of 3" in rest


@pytest.mark.parametrize("command", ["run", "backfill"])
def test_a_command_with_one_connection_for_its_workers_loads_everything(
    cli: Cli, one_connection: Connection, role: str, command: str
) -> None:
    one_connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1".encode())
    one_connection.commit()
    many_segments(cli.spool, 1200)
    cli(command, "--workers", "4", "--once" if command == "run" else cli.spool)
    assert number(one_connection, EVENTS) == 1200


def test_a_connection_that_is_lost_gives_its_batch_to_another_worker(
    cli: Cli, one_connection: Connection, role: str
) -> None:
    many_segments(cli.spool, 3000)
    with cli.daemon("--workers", "3"):
        eventually(lambda: number(one_connection, EVENTS) > 0)
        one_connection.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1".encode())
        one_connection.commit()
        one_connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role]
        )
        one_connection.commit()
        eventually(lambda: number(one_connection, EVENTS) == 3000, 60)
        eventually(lambda: not list(cli.spool.glob("2*")), 60)


def test_a_batch_that_is_refused_as_a_whole_does_not_hold_up_what_comes_later(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute(raising("42501").encode())
    one_connection.commit()
    with cli.daemon() as process:
        segment(cli.spool, 1, event(1, event_type="cursed"))
        assert process.stderr is not None
        assert "not this one" in next(line for line in process.stderr if b"WARNING" in line).decode()
        assert not rejected(cli.spool)  # it may be the configuration
        segment(cli.spool, 2, event(2))
        eventually(lambda: number(one_connection, EVENTS) == 1)
        eventually(lambda: not list(cli.spool.glob("2*")))
    assert [code for _, _, code in rejected(cli.spool)] == ["postgres_42501"]


def test_a_large_batch_that_is_refused_as_a_whole_stays_and_the_others_are_loaded(
    cli: Cli, one_connection: Connection
) -> None:
    one_connection.execute(raising("42501").encode())
    one_connection.commit()
    segment(cli.spool, 1, *[event(n, event_type="cursed", metadata={"x": "y" * 2000}) for n in range(3000)])
    many = [event(10_000 + n, metadata={"x": "y" * 2000}) for n in range(3000)]
    segment(cli.spool, 2, *many)
    printed = cli("run", "--once", "--workers", "1", code=1)
    assert "not this one" in printed
    assert number(one_connection, EVENTS) >= 2000
    assert len(list(cli.spool.glob("2*"))) == 1


def test_loaders_of_the_same_lines_in_different_orders_do_not_hold_up_each_other(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    lines = [event(n) for n in range(60_000)]
    processes = []
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        path = tmp_path / f"order-{seed}.ndjson"
        path.write_bytes(joined(*lines))
        processes.append(
            subprocess.Popen([*LOADER, "backfill", path], env=cli.environment, stderr=subprocess.PIPE)
        )
    for process in processes:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log.decode()
    assert number(one_connection, EVENTS) == 60_000
    assert rows(
        one_connection, "SELECT sum(events), sum(duplicates), sum(rejected) FROM analytics_loads"
    ) == [(60_000, 120_000, 0)]


def test_loaders_of_the_same_chunks_at_once_load_each_once(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    path = tmp_path / "same.ndjson"
    path.write_bytes(joined(*map(event, range(60_000))))
    command = [*LOADER, "backfill", str(path)]
    processes = [subprocess.Popen(command, env=cli.environment, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log.decode()
    assert rows(
        one_connection, "SELECT sum(events), sum(duplicates), sum(rejected) FROM analytics_loads"
    ) == [(60_000, 0, 0)]


def test_workers_that_take_a_failing_batch_in_turns_give_up_together(
    cli: Cli, one_connection: Connection
) -> None:
    """Each insert is cancelled, as by a server that shuts down, and the worker that is free takes the batch."""
    one_connection.execute(
        "CREATE FUNCTION cancel() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(0.5); PERFORM pg_cancel_backend(pg_backend_pid()); PERFORM pg_sleep(1); RETURN NEW; END'; "
        "CREATE TRIGGER cancels BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION cancel()"
    )
    one_connection.commit()
    segment(cli.spool, 1, event(1))
    signals = Signals()
    workers = Workers(lambda: cli.dsn, cli.spool, 2, signals, patience=1.0)
    too_late = threading.Timer(20.0, signals.stop.set)
    too_late.start()
    with closing(workers), pytest.raises(OutOfReachError):
        daemon.once(cli.spool, workers, None)
    too_late.cancel()
