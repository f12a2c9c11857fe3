"""The tour: processes of a family photo application emit, one is killed, the loader loads, all is counted.

Each process tells on its standard output the id of what was emitted, after the emit returned; these are the
acknowledged ones, and every one of them must be in Postgres exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, LiteralString

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from loader import database, embedded
from spool import AnalyticsService, Emitter
from spool.context import bind
from spool.segment import SEALED

PROCESSES: Final = 4
EMITS: Final = 4000
"""What each process emits: the three that live make 12,000."""
_KILLED_AFTER: Final = EMITS // 3
_CATCH_UP_SECONDS: Final = 40.0
_EVENTS: Final = (
    "memory_posted", "memory_viewed", "reaction_added", "comment_posted", "feed_viewed", "invite_sent",
    "family_joined", "child_added", "pet_added",
)  # fmt: skip
_ENDPOINTS: Final = ("/api/v1/feed", "/api/v1/memories", "/api/v1/comments", "/api/v1/reactions")


def run(dsn: str | None, console: Console) -> bool:
    """Show it all on `dsn`, or on a throw-away server. Returns whether every sum holds."""
    with contextlib.ExitStack() as stack:
        if dsn is None:
            console.print("Starting a throw-away Postgres ...")
            dsn = stack.enter_context(embedded.server())
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="analytics-spool-")))
        connection = stack.enter_context(database.connect(dsn))
        database.apply_schema(connection)
        connection.commit()
        environment = {**os.environ, "LOADER_DSN": dsn, "SPOOL_DIR": str(spool)}
        console.print(f"Spool: {spool}. {PROCESSES} processes emit, and the loader runs.")
        before = _sums(connection)
        with _loader(environment):
            applications = [_Application(spool, seed) for seed in range(PROCESSES)]
            _follow(applications, spool, connection, console)
        console.print("Loading what the killed process left behind ...")
        drained = subprocess.run([*_LOADER, "--once"], env=environment, capture_output=True, text=True)
        console.print(f"  {drained.stdout.strip()}")
        acknowledged = [line for application in applications for line in application.acknowledged]
        console.print(_arrived(connection))
        return drained.returncode == 0 and _check(connection, acknowledged, before, console)


_LOADER: Final = (sys.executable, "-m", "loader", "run")


@contextlib.contextmanager
def _loader(environment: dict[str, str]) -> Iterator[None]:
    """The daemon, stopped as systemd would."""
    with subprocess.Popen(_LOADER, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.terminate()
            _, log = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the loader ended with {process.returncode}:\n{log}")


class _Application:
    """One process that emits, and what it acknowledged."""

    def __init__(self, spool: Path, seed: int) -> None:
        self.acknowledged: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loader.demo", str(spool), str(seed)], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None  # it is a pipe
        for line in self._process.stdout:
            if line.endswith("\n"):  # a kill may cut the last one
                self.acknowledged.append(line.strip())

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def ended(self) -> bool:
        return not self._reader.is_alive() and self._process.poll() is not None

    @property
    def pid(self) -> int:
        return self._process.pid


def _follow(
    applications: list[_Application], spool: Path, connection: database.Connection, console: Console
) -> None:
    """Show the counts until all processes have ended and the loader has caught up; kill one in the middle."""
    victim, killed = applications[0], False
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        total = PROCESSES * EMITS
        emitted, loaded = (progress.add_task(name, total=total) for name in ("acknowledged", "in Postgres"))
        before, _ = _sums(connection)
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        running = True
        while running:
            emitting = not all(application.ended() for application in applications)
            running = time.monotonic() < deadline and (emitting or any(spool.glob(f"*{SEALED}")))
            if not killed and len(victim.acknowledged) >= _KILLED_AFTER:
                victim.kill()
                killed = True
                progress.print(f"SIGKILL to process {victim.pid}, {len(victim.acknowledged)} emits in.")
            progress.update(emitted, completed=sum(len(each.acknowledged) for each in applications))
            progress.update(loaded, completed=_sums(connection)[0] - before)
            time.sleep(0.05)  # between two looks
        for task in (emitted, loaded):
            progress.update(task, total=sum(len(each.acknowledged) for each in applications))


def _check(
    connection: database.Connection, acknowledged: list[str], before: tuple[int, int], console: Console
) -> bool:
    """Whether every acknowledged id is there once, and the ledger adds up and counts the rows there are."""
    found = _number(
        connection,
        "SELECT (SELECT count(*) FROM analytics_events WHERE event_id = ANY(%(ids)s::uuid[])) "
        "+ (SELECT count(*) FROM analytics_metrics WHERE id = ANY(%(ids)s::uuid[]))",
        ids=acknowledged,
    )
    wrong = _number(
        connection,
        "SELECT count(*) FROM analytics_loads WHERE lines <> events + metrics + duplicates + rejected",
    )
    counted, rows = (now - then for now, then in zip(_sums(connection), before, strict=True))
    different = len(set(acknowledged))
    console.print(f"Acknowledged emits: {len(acknowledged)}, different: {different}, in Postgres: {found}")
    console.print(f"Rows in the tables: {rows}, events and metrics in the ledger: {counted}")
    console.print(f"Ledger rows whose lines are not events + metrics + duplicates + rejected: {wrong}")
    return len(acknowledged) == different == found and counted == rows and not wrong


def _sums(connection: database.Connection) -> tuple[int, int]:
    """How many rows the ledger has counted, and how many there are."""
    counted = _number(connection, "SELECT coalesce(sum(events + metrics), 0) FROM analytics_loads")
    rows = "SELECT (SELECT count(*) FROM analytics_events) + (SELECT count(*) FROM analytics_metrics)"
    return counted, _number(connection, rows)


def _number(connection: database.Connection, statement: LiteralString, **values: object) -> int:
    with connection.transaction():
        row = connection.execute(statement, values).fetchone()
    return int(row[0]) if row else 0


def _arrived(connection: database.Connection) -> Table:
    table = Table("table", "kind", "rows", title="What arrived", title_justify="left")
    for row in connection.execute(
        "SELECT 'analytics_events', event_type, count(*)::text FROM analytics_events GROUP BY 2 "
        "UNION ALL SELECT 'analytics_metrics', metric_name, count(*)::text FROM analytics_metrics GROUP BY 2 "
        "ORDER BY 1, 2"
    ):
        table.add_row(*row)
    return table


async def _traffic(analytics: AnalyticsService, seed: int) -> None:
    """Requests of an application, each with its events and metrics."""
    chance = random.Random(seed)
    families = [(uuid.uuid4(), [uuid.uuid4() for _ in range(4)]) for _ in range(5)]
    for number in range(EMITS // 4):
        family, members = chance.choice(families)
        endpoint = {"endpoint": chance.choice(_ENDPOINTS)}
        with bind(user_id=chance.choice(members), family_unit_id=family, request_id=str(uuid.uuid4())):
            _tell(await analytics.emit_event(event_type=chance.choice(_EVENTS), metadata=_memory(chance)))
            _tell(await analytics.increment_counter(metric_name="api_request_count", labels=endpoint))
            duration = chance.lognormvariate(3, 1)
            _tell(
                await analytics.record_timer(
                    metric_name="api_request_duration_ms", duration_ms=duration, labels=endpoint
                )
            )
            _tell(await analytics.record_gauge(metric_name="feed_length", value=chance.randrange(100)))
        if number % 4 == 0:
            await asyncio.sleep(0.01)  # people take their time


def _memory(chance: random.Random) -> dict[str, Any]:
    return {"memory_id": str(uuid.uuid4()), "photos": chance.randrange(1, 12), "title": "Erster Schultag"}


def _tell(event_id: str | None) -> None:
    sys.stdout.write(f"{event_id}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_traffic(AnalyticsService(Emitter(sys.argv[1])), int(sys.argv[2])))
