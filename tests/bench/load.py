"""Benchmark of the loader against psql's \\copy of a ready file and against alternatives.

    python -m tests.bench.load [--rows N] [--dsn DSN] [--version 15|16|18] [--part NAME ...]

The floor is \\copy of a prepared text file into the same indexed table, with the default `id`. Every figure
is rows per second of a whole command, in a separate process, and its ratio to the floor of the same repeat.
Parts: rates (workers, duplicates, replay, foreign keys), peers (what is installed of the extra `bench`),
memory, freshness, big (into a table of many rows).
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import psycopg

from loader.demo import embedded
from loader.load import schema
from tests.processes import LOADER, environment

COLUMNS = "event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata"
TYPES = (
    "memory_posted", "memory_viewed", "reaction_created", "comment_created", "feed_viewed", "user_logged_in",
    "invite_created", "memory_updated", "reaction_deleted", "pet_created",
)  # fmt: skip


def events(count: int, version: int, seed: int = 7) -> Iterator[bytes]:
    """Realistic events: few busy users and many quiet ones, three milliseconds apart."""
    chance = random.Random(seed)
    people = [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in range(20_000)]
    moment = datetime(2026, 1, 20, 12, tzinfo=UTC)
    for number in range(count):
        moment += timedelta(milliseconds=3, microseconds=chance.randrange(1000))
        user = min(int(chance.paretovariate(0.6)), len(people) - 1)
        bits = chance.getrandbits(128)
        if version == 7:
            bits = int(moment.timestamp() * 1000) << 80 | bits & ((1 << 80) - 1)
        event_id = str(uuid.UUID(int=bits & ~(0xF << 76) & ~(0x3 << 62) | version << 76 | 2 << 62))
        yield orjson.dumps(
            {
                "event_id": event_id,
                "event_type": TYPES[int(chance.random() ** 2 * len(TYPES))],
                "timestamp": moment.isoformat().replace("+00:00", "Z"),
                "user_id": people[user],
                "family_unit_id": people[user % 5000],
                "session_id": people[user * 7 % len(people)],
                "metadata": {
                    "memory_id": people[chance.randrange(len(people))],
                    "title": f"Family Vacation {number}",
                    "media_count": chance.randrange(9),
                },
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


class Bench:
    """A server and a set of files."""

    def __init__(self, dsn: str, home: Path, rows: int, versions: Sequence[int] = (7, 4)) -> None:
        self.dsn, self.home, self.rows = dsn, home, rows
        self.versions = versions
        self.spool = home / "spool"
        self.spool.mkdir()
        self.environment = environment(LOADER_DSN=dsn, SPOOL_DIR=str(self.spool))

    def file(self, version: int) -> Path:
        path = self.home / f"v{version}.ndjson"
        if not path.exists():
            with path.open("wb") as file:
                file.writelines(events(self.rows, version))
        return path

    def ready(self, version: int) -> Path:
        """Write the same rows in the format of \\copy."""
        path = self.home / f"v{version}.txt"
        if not path.exists():
            with path.open("w") as file:
                for line in self.file(version).open("rb"):
                    row = orjson.loads(line)
                    row["metadata"] = orjson.dumps(row["metadata"]).decode()
                    file.write("\t".join(row.values()).replace("\\", "\\\\") + "\n")
        return path

    def reset(self, *statements: str) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            tables = "analytics_events, analytics_metrics, analytics_loads, family_units"
            connection.execute(f"DROP TABLE IF EXISTS {tables} CASCADE".encode())
            connection.execute("DROP SCHEMA IF EXISTS auth CASCADE")
            for statement in statements:
                connection.execute(statement.encode())
            schema.apply_schema(connection)
            connection.execute("CHECKPOINT")

    def run(self, *command: object) -> float:
        """Return the run time of a command in seconds."""
        begin = time.perf_counter()
        ended = subprocess.run([str(word) for word in command], env=self.environment, capture_output=True)
        seconds = time.perf_counter() - begin
        assert ended.returncode == 0, ended.stderr.decode()
        return seconds

    def floor(self, version: int) -> float:
        """Return the rows per second of \\copy."""
        copy = f"\\copy analytics_events ({COLUMNS}) from '{self.ready(version)}'"
        return self.rows / self.run("psql", "-q", self.dsn, "-c", copy)

    def backfill(self, *files: Path, workers: int = 1) -> float:
        """Return the rows per second of `loader backfill`."""
        return self.rows / self.run(*LOADER, "backfill", "--workers", workers, *files)

    def count(self) -> int:
        with psycopg.connect(self.dsn) as connection:
            row = connection.execute("SELECT count(*) FROM analytics_events").fetchone()
        return int(row[0]) if row else 0


def duplicated(file: Path, share: float) -> Path:
    """Write the events with this share of them repeated with different bytes, spread evenly."""
    path = file.with_name(f"{file.stem}-{share}.ndjson")
    if not path.exists():
        chance = random.Random(share)
        lines = file.read_bytes().splitlines(keepends=True)
        with path.open("wb") as out:
            for number, line in enumerate(lines):
                again = number and chance.random() < share
                out.write(b" " + lines[chance.randrange(number)] if again else line)
    return path


def other_bytes(file: Path) -> Path:
    """Return the same events with different bytes, so that the ledger does not recognize them."""
    path = file.with_name(f"{file.stem}-again.ndjson")
    if not path.exists():
        with path.open("wb") as out:
            out.writelines(b" " + line for line in file.open("rb"))
    return path


def rates(bench: Bench, repeats: int) -> None:
    for version in bench.versions:
        measures: dict[str, list[float]] = {}

        def note(name: str, rate: float, floor: float, into: dict[str, list[float]] = measures) -> None:
            into.setdefault(name, []).append(rate / floor)

        for _ in range(repeats):
            bench.reset()
            floor = bench.floor(version)
            note("floor: psql \\copy", floor, floor)
            for workers in (1, 2, 4):
                bench.reset()
                note(f"{workers} workers", bench.backfill(bench.file(version), workers=workers), floor)
            for share in (0.01, 0.5):
                bench.reset()
                rate = bench.backfill(duplicated(bench.file(version), share))
                note(f"1 worker, {share:.0%} duplicates", rate, floor)
            bench.reset()
            bench.backfill(bench.file(version))
            note("1 worker, ledger knows all", bench.backfill(bench.file(version)), floor)
            note("1 worker, 100% duplicates", bench.backfill(other_bytes(bench.file(version))), floor)
            again = other_bytes(other_bytes(bench.file(version)))
            note("2 workers, 100% duplicates", bench.backfill(again, workers=2), floor)
            assert bench.count() == bench.rows
            bench.reset(*with_users(bench.file(version)))
            note("1 worker, foreign keys", bench.backfill(bench.file(version)), floor)
            bench.reset(*with_users(bench.file(version)))
            note("floor with foreign keys", bench.floor(version), floor)
        print(f"\nUUIDv{version} event ids, {bench.rows} rows; floor {floor:.0f} rows/s in the last repeat")
        for name, ratios in measures.items():
            print(f"  {name:32s} {statistics.median(ratios):6.2f} x floor", flush=True)


def with_users(file: Path) -> list[str]:
    """Create the application's own tables, to which schema.sql adds foreign keys."""
    rows = [orjson.loads(line) for line in file.open("rb")]
    users, families = ({row[key] for row in rows} for key in ("user_id", "family_unit_id"))
    return [
        "CREATE SCHEMA auth",
        "CREATE TABLE auth.users (id uuid PRIMARY KEY)",
        "CREATE TABLE family_units (id uuid PRIMARY KEY)",
        f"INSERT INTO auth.users VALUES ({'), ('.join(map(repr, users))})",
        f"INSERT INTO family_units VALUES ({'), ('.join(map(repr, families))})",
    ]


def peak_mib(bench: Bench, *arguments: object) -> float:
    """Return the peak memory of `loader` with these arguments, as counted by the kernel (proc(5), VmHWM).

    The figure of wait4(2) includes the memory of the parent, which the child had until execve(2).
    """
    process = subprocess.Popen(
        [*LOADER, *map(str, arguments)], env=bench.environment, stdout=subprocess.DEVNULL
    )
    peak = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.01)  # it is read while the process runs
    assert process.returncode in (0, 3)
    return peak / 1024


def memory(bench: Bench, _: int) -> None:
    print("\nPeak memory of the loader, MiB")
    for workers in (2, 4):
        bench.reset()
        big = bench.home / "big.ndjson"
        data = bench.file(7).read_bytes()
        with big.open("wb") as file:
            while file.tell() < 1 << 30:
                file.write(data)
        peak = peak_mib(bench, "backfill", "--workers", workers, big)
        print(f"  a file of 1 GiB, {workers} workers: {peak:.0f}", flush=True)
        big.unlink()
    bench.reset()
    line = bench.home / "line.ndjson"
    with line.open("wb") as file:
        for _ in range(900):
            file.write(b"x" * 1_000_000)
    print(f"  one line of 900 MB without a newline: {peak_mib(bench, 'backfill', line):.0f}")
    line.unlink()
    bench.reset()
    lines = bench.file(7).read_bytes().splitlines(keepends=True)
    writer = "20260120T120000.000000Z-web-0a1b2c3d-42-deadbeef"
    for number in range(50_000):
        (bench.spool / f"{writer}-{number + 1:06d}.ndjson").write_bytes(lines[number % len(lines)])
    begin = time.perf_counter()
    print(
        f"  50,000 small files: {peak_mib(bench, 'run', '--once'):.0f}, {time.perf_counter() - begin:.1f} s"
    )


EMIT = """
import sys, time, uuid
from spool import Emitter
emitter = Emitter(sys.argv[1], max_age=float(sys.argv[2]))
user = uuid.uuid4()
rate, seconds = 1000, float(sys.argv[3])
begin = time.monotonic()
for n in range(int(rate * seconds)):
    time.sleep(max(0, begin + n / rate - time.monotonic()))
    emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user)
emitter.close()
"""


def freshness(bench: Bench, _: int, seconds: float = 20.0) -> None:
    """Measure the time from the call to a visible row, at 1,000 events a second."""
    print("\nFreshness at 1,000 events/s, seconds")
    for max_age in (1.0, 0.1):
        bench.reset()
        with daemon(bench), psycopg.connect(bench.dsn, autocommit=True) as connection:
            emitter = subprocess.Popen([sys.executable, "-c", EMIT, bench.spool, str(max_age), str(seconds)])
            lags: list[float] = []
            seen = 0
            while seen < 1000 * seconds:
                # Polling detects a row at most one interval late: the figures are upper bounds.
                found = connection.execute(
                    "SELECT extract(epoch FROM clock_timestamp() - timestamp)::float8 FROM analytics_events "
                    "ORDER BY event_id OFFSET %s", [seen],
                ).fetchall()  # fmt: skip
                lags += [lag for (lag,) in found]
                seen += len(found)
            emitter.wait()
        lags.sort()
        p50, p99 = lags[len(lags) // 2], lags[int(len(lags) * 0.99)]
        print(f"  max_age {max_age}: p50 {p50:.3f}, p99 {p99:.3f}, max {lags[-1]:.3f}", flush=True)


@contextmanager
def daemon(bench: Bench) -> Iterator[None]:
    process = subprocess.Popen([*LOADER, "run"], env=bench.environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "watching" not in process.stderr.readline():
        pass
    reading = threading.Thread(target=process.stderr.read, daemon=True)
    reading.start()
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def big(bench: Bench, _: int, rows: int = 10_000_000) -> None:
    """Load into a table with ten million rows, and into an empty one."""
    bench.reset()
    empty = bench.backfill(bench.file(7))
    bench.reset()
    with psycopg.connect(bench.dsn, autocommit=True) as connection:
        for index in ("type", "user", "family"):  # building them afterwards takes a fifth of the time
            connection.execute(f"DROP INDEX analytics_events_{index}_time".encode())
        connection.execute(OLD_ROWS.encode(), [rows])
        schema.apply_schema(connection)
        connection.execute("CHECKPOINT")
    full = bench.backfill(bench.file(7))
    print(
        f"\nInto {rows:,} rows: {full / empty:.2f} x of into an empty table ({empty:.0f} rows/s)", flush=True
    )


OLD_ROWS = """
INSERT INTO analytics_events
    (id, event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata)
SELECT id, id, 'type_' || n %% 10, '2026-01-01'::timestamptz - n * interval '1 s',
    md5((n %% 20000)::text)::uuid, md5((n %% 5000)::text)::uuid, NULL,
    jsonb_build_object('memory_id', n, 'title', 'Family Vacation ' || n)
FROM generate_series(1, %s) n, LATERAL (
    SELECT (lpad(to_hex(1600000000000 - n), 12, '0') || '7' || substr(md5(n::text), 1, 3) || '8'
        || substr(md5(n::text), 4, 15))::uuid AS id
) AS made
"""


def peers(bench: Bench, repeats: int) -> None:
    from tests.bench.load_peers import PEERS

    print("\nPeers, same rows, same table")
    for name, load in PEERS.items():
        bench.reset()
        floor = bench.floor(7)
        bench.reset()
        try:
            begin = time.perf_counter()
            load(bench.dsn, bench.file(7))
            rate = bench.rows / (time.perf_counter() - begin)
        except ImportError as error:
            print(f"  {name:44s} left out: {error}")
            continue
        print(f"  {name:44s} {rate / floor:6.2f} x floor, {bench.count()} rows", flush=True)


PARTS: dict[str, Callable[[Bench, int], None]] = {
    "rates": rates, "peers": peers, "memory": memory, "freshness": freshness, "big": big,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rows", type=int, default=200_000)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--ids", type=int, choices=(7, 4), action="append", help="UUID version of events")
    arguments.add_argument("--dsn", help="a database whose analytics tables may be dropped")
    arguments.add_argument("--version", type=int, default=18, help="of the embedded Postgres")
    arguments.add_argument("--part", choices=PARTS, action="append", help="what to measure; else everything")
    given = arguments.parse_args(words)
    with tempfile.TemporaryDirectory() as home:
        if given.dsn:
            measure(given, given.dsn, Path(home))
        else:
            with embedded.server(given.version, *SERVER) as dsn:
                measure(given, dsn, Path(home))


SERVER = ("-c", "shared_buffers=4GB", "-c", "max_wal_size=8GB", "-c", "checkpoint_timeout=30min")
"""A server that does not write a checkpoint in the middle of a measurement."""


def measure(given: argparse.Namespace, dsn: str, home: Path) -> None:
    bench = Bench(dsn, home, given.rows, given.ids or (7, 4))
    for part in given.part or PARTS:
        PARTS[part](bench, given.repeats)


if __name__ == "__main__":
    main()
