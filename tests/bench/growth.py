"""Benchmark of loading into growing tables: the plain layout and the partitioned one, in one run.

    python -m tests.bench.growth [--rows 20000000] [--version 18] [--foreign-keys] [--home DIR]

Two servers with shared_buffers of 1 GB, each limited to 2.5 GB of memory (needs root and the memory controller
of cgroup 1), get the same events: 90 days in the order of their time, 1 % of them up to three days late, 1 % with
ids of version 4. At 1, 5, 10 and 20 million rows, a slice of 400,000 rows is measured twice, by COPY of ready text
and by `loader run --once` with one worker: rows a second, CPU seconds of the server and WAL per million rows. The
rest is filled by COPY. The rate of the loader is that of its whole command, less the time that it takes for an
empty spool. fsync is off, because the disk is not what is measured; full_page_writes is on.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import orjson
import psycopg

from loader.demo.embedded import Cluster
from loader.load import partitions, schema
from tests.processes import LOADER, environment

MILESTONES: Final = (1_000_000, 5_000_000, 10_000_000, 20_000_000)
SLICE: Final = 400_000
_FILL: Final = 200_000
_USERS: Final = 200_000
_FAMILIES: Final = 60_000
_DAYS: Final = 90
_MEMORY: Final = int(2.5 * 2**30)
_COLUMNS: Final = "id, event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata"
_TYPES: Final = ("feed_viewed", "memory_viewed", "reaction_created", "comment_created", "memory_posted")
_OPTIONS: Final = (
    "-c", "shared_buffers=1GB", "-c", "full_page_writes=on", "-c", "max_wal_size=2GB", "-c", "jit=off",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=MILESTONES[-1])
    parser.add_argument("--version", type=int, default=18)
    parser.add_argument("--foreign-keys", action="store_true")
    parser.add_argument("--home", type=Path, default=None)
    given = parser.parse_args()
    with contextlib.ExitStack() as until:
        servers = [
            until.enter_context(_server(layout, given.version, given.home, given.foreign_keys))
            for layout in ("plain", "partitioned")
        ]
        source = _Source(given.rows)
        print(
            f"{'million rows':>12} {'layout':<12}{'':<8}{'rows/s':>9}{'CPU s/M':>9}{'WAL MB/M':>10}",
            flush=True,
        )
        for milestone in (each for each in MILESTONES if each <= given.rows):
            while source.made < milestone - 2 * SLICE:
                block = "".join(map(_text, source.events(min(_FILL, milestone - 2 * SLICE - source.made))))
                for server in servers:
                    server.copy(block)
            copied = "".join(map(_text, source.events(SLICE)))
            loaded = b"".join(map(_line, source.events(SLICE)))
            for server in servers:
                _report(milestone, server, "COPY", server.measured(partial(server.copy, copied)))
                _report(milestone, server, "loader", server.measured(partial(server.load, loaded)))
        for server in servers:
            print(server.layout, server.sizes(), flush=True)


class _Source:
    """Events in the order of their time, from `_DAYS` ago until now; the same for every run."""

    def __init__(self, total: int) -> None:
        self.made = 0
        self._chance = random.Random(7)
        self._begin = datetime.now(UTC) - timedelta(days=_DAYS)
        self._step = timedelta(days=_DAYS) / total

    def events(self, count: int) -> Iterator[tuple[str, str, str, int, int]]:
        chance = self._chance
        for _ in range(count):
            moment = self._begin + self._step * self.made
            self.made += 1
            if chance.random() < 0.01:
                moment -= timedelta(days=3) * chance.random()
            bits = chance.getrandbits(128)
            version = 4 if chance.random() < 0.01 else 7
            if version == 7:
                bits = int(moment.timestamp() * 1000) << 80 | bits & ((1 << 80) - 1)
            number = bits & ~(0xF << 76) & ~(0x3 << 62) | version << 76 | 2 << 62
            hexadecimal = f"{number:032x}"
            event_id = "-".join(
                (hexadecimal[:8], hexadecimal[8:12], hexadecimal[12:16], hexadecimal[16:20], hexadecimal[20:])
            )
            yield (
                event_id,
                _TYPES[int(chance.random() ** 2 * 5)],
                moment.isoformat(),
                chance.randrange(_USERS),
                self.made,
            )


def _person(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def _metadata(number: int) -> dict[str, object]:
    return {
        "role": "parent",
        "memory_id": _person(number % 5000),
        "duration_ms": number % 60000,
        "source": "feed",
    }


def _text(event: tuple[str, str, str, int, int]) -> str:
    event_id, kind, moment, user, number = event
    return (
        f"{event_id}\t{event_id}\t{kind}\t{moment}\t{_person(user)}\t{_person(user % _FAMILIES)}\t\\N\t"
        f"{orjson.dumps(_metadata(number)).decode()}\n"
    )


def _line(event: tuple[str, str, str, int, int]) -> bytes:
    event_id, kind, moment, user, number = event
    return orjson.dumps(
        {"event_id": event_id, "event_type": kind, "timestamp": moment, "user_id": _person(user),
         "family_unit_id": _person(user % _FAMILIES), "session_id": None, "metadata": _metadata(number)},
        option=orjson.OPT_APPEND_NEWLINE,
    )  # fmt: skip


@dataclass
class Cost:
    rows_per_second: float
    cpu_per_million: float
    wal_per_million: float


class _Server:
    def __init__(self, layout: str, dsn: str, group: _Group, spool: Path) -> None:
        self.layout = layout
        self._dsn = dsn
        self._group = group
        self._spool = spool
        self._files = 0
        self._idle = 0.0
        self._idle = min(self._loader() for _ in range(3))

    def copy(self, block: str) -> float:
        """Copy rows; return the seconds that it took."""
        with psycopg.connect(self._dsn) as connection:
            begun = time.perf_counter()
            with connection.cursor().copy(f"COPY analytics_events ({_COLUMNS}) FROM STDIN") as copy:
                for start in range(0, len(block), 1 << 20):
                    copy.write(block[start : start + (1 << 20)])
            connection.commit()
            return time.perf_counter() - begun

    def load(self, lines: bytes) -> float:
        """Load rows; return the seconds that it took, without those of a loader that has nothing to do."""
        self._files += 1
        name = f"20260120T120000.000000Z-web-0a1b2c3d-42-deadbeef-{self._files:06d}.ndjson"
        (self._spool / name).write_bytes(lines)
        return self._loader() - self._idle

    def _loader(self) -> float:
        begun = time.perf_counter()
        subprocess.run(
            [*LOADER, "run", "--once", "--workers", "1"], check=True, stdout=subprocess.DEVNULL,
            env=environment(LOADER_DSN=self._dsn, SPOOL_DIR=str(self._spool)),
        )  # fmt: skip
        return time.perf_counter() - begun

    def measured(self, work: Callable[[], float]) -> Cost:
        wal, cpu = self._wal(), self._group.cpu()
        seconds = work()
        millions = SLICE / 1e6
        return Cost(
            SLICE / seconds, (self._group.cpu() - cpu) / millions, (self._wal() - wal) / 1e6 / millions
        )

    def sizes(self) -> str:
        with psycopg.connect(self._dsn) as connection:
            found = connection.execute(
                "SELECT sum(pg_table_size(c.oid)), sum(pg_indexes_size(c.oid)), "
                "(SELECT count(*) FROM analytics_events) FROM pg_class c WHERE relkind = 'r' "
                "AND relname LIKE 'analytics_events%'"
            ).fetchone()
        assert found is not None  # an aggregate has one row
        heap, indexes, count = found
        return f"{count} rows, {heap / count:.0f} + {indexes / count:.0f} bytes a row in heap and indexes"

    def _wal(self) -> float:
        with psycopg.connect(self._dsn) as connection:
            row = connection.execute("SELECT (pg_current_wal_lsn() - '0/0')::float8").fetchone()
        assert row is not None
        return float(row[0])


def _report(milestone: int, server: _Server, how: str, cost: Cost) -> None:
    print(
        f"{milestone // 10**6:>12} {server.layout:<12}{how:<8}{cost.rows_per_second:>9,.0f}"
        f"{cost.cpu_per_million:>9.1f}{cost.wal_per_million:>10,.0f}", flush=True,
    )  # fmt: skip


class _Group:
    """A control group (cgroup 1) with a limit of memory, which also counts the CPU time of its processes."""

    def __init__(self, name: str, process: int) -> None:
        self._directories = [Path("/sys/fs/cgroup", kind, name) for kind in ("memory", "cpuacct")]
        for directory in self._directories:
            directory.mkdir(exist_ok=True)
        (self._directories[0] / "memory.limit_in_bytes").write_text(str(_MEMORY))
        for member in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(member.read_text().rpartition(")")[2].split()[2]) == process:  # its process group
                    for directory in self._directories:
                        (directory / "cgroup.procs").write_text(member.parent.name)

    def cpu(self) -> float:
        return int((self._directories[1] / "cpuacct.usage").read_text()) / 1e9

    def remove(self) -> None:
        for directory in self._directories:
            with contextlib.suppress(OSError):
                directory.rmdir()


@contextlib.contextmanager
def _server(layout: str, version: int, home: Path | None, foreign_keys: bool) -> Iterator[_Server]:
    with tempfile.TemporaryDirectory(prefix="growth-", dir=home, ignore_cleanup_errors=True) as name:
        cluster = Cluster(Path(name), version, *_OPTIONS)
        cluster.start()
        assert cluster.process is not None
        group = _Group(f"growth-{layout}-{uuid.uuid4().hex[:6]}", cluster.process.pid)
        spool = Path(name) / "spool"
        spool.mkdir()
        try:
            _prepare(cluster.dsn, layout, foreign_keys=foreign_keys)
            yield _Server(layout, cluster.dsn, group, spool)
        finally:
            cluster.stop()
            group.remove()


def _prepare(dsn: str, layout: str, *, foreign_keys: bool) -> None:
    with psycopg.connect(dsn) as connection:
        if foreign_keys:
            connection.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY)")
            connection.execute("CREATE TABLE family_units (id UUID PRIMARY KEY)")
            for table, count in (("auth.users", _USERS), ("family_units", _FAMILIES)):
                connection.execute(
                    f"INSERT INTO {table} SELECT ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid "
                    f"FROM generate_series(0, {count}) n".encode()
                )
            connection.commit()
        schema.apply_schema(connection, layout="partitioned" if layout == "partitioned" else "plain")
        since = datetime.now(UTC) - timedelta(days=_DAYS + 4)
        partitions.make(connection, since, datetime.now(UTC) + timedelta(days=2))
        connection.execute("ANALYZE")
        connection.commit()


if __name__ == "__main__":
    main()
