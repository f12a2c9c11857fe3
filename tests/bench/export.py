"""Exports millions of events to Parquet, CSV and NDJSON: rows a second, CPU seconds and peak memory.

    python -m tests.bench.export [ROWS]

The indexes of the tables are dropped first: an export reads the table,
and filling it is not what is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import psycopg

from loader.demo import embedded
from loader.load import schema
from tests.processes import LOADER, environment

ROWS: Final = 5_000_000
_TARGETS: Final = (
    ("events.parquet", ()),
    ("typed.parquet", ("--column", "metadata.duration_ms:float", "--column", "metadata.memory_id")),
    ("events.ndjson", ()),
    ("events.csv", ()),
)
_FILL: Final = """
INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, session_id, metadata)
SELECT gen_random_uuid(),
(ARRAY['memory_viewed', 'feed_viewed', 'reaction_created', 'comment_created'])[1 + n %% 4],
    now() - n * interval '1 second', md5((n %% 30000)::text)::uuid, md5((n %% 9000)::text)::uuid,
    md5((n / 10)::text)::uuid,
    jsonb_build_object('role', 'parent', 'request_id', md5(n::text), 'memory_id', md5((n %% 500)::text)::uuid,
        'duration_ms', n %% 60000, 'source', 'feed')
FROM generate_series(1, %s) AS n
"""


def main(rows: int) -> None:
    with embedded.server() as dsn, tempfile.TemporaryDirectory() as home:
        with psycopg.connect(dsn) as connection:
            schema.apply_schema(connection)
            _drop_indexes(connection)
            connection.execute(_FILL.encode(), [rows])
        print(f"{'file':<16}{'rows/s':>10}{'CPU s':>8}{'peak MiB':>10}{'MB':>8}")
        for name, options in _TARGETS:
            file = Path(home) / name
            _measure([*LOADER, "export", str(file), *options], dsn, file, rows)
            file.unlink()


def _drop_indexes(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    statement = "SELECT indexrelid::regclass FROM pg_index WHERE indrelid = 'analytics_events'::regclass"
    connection.execute("ALTER TABLE analytics_events DROP CONSTRAINT IF EXISTS analytics_events_event_id_key")
    connection.execute("ALTER TABLE analytics_events DROP CONSTRAINT IF EXISTS analytics_events_pkey")
    for (index,) in connection.execute(statement.encode()).fetchall():
        connection.execute(f"DROP INDEX {index}".encode())


def _measure(command: list[str], dsn: str, file: Path, rows: int) -> None:
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment(LOADER_DSN=dsn), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    seconds, cpu = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    peak, size = usage.ru_maxrss / 1024, file.stat().st_size / 1e6
    print(f"{file.name:<16}{rows / seconds:>10,.0f}{cpu:>8.1f}{peak:>10.0f}{size:>8.0f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
