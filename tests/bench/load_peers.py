"""Alternatives for loading the same file. Each raises ImportError if it is not installed."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import psycopg
from psycopg.conninfo import conninfo_to_dict

COLUMNS = ("event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata")


def rows(file: Path) -> Iterator[tuple[str, ...]]:
    for line in file.open("rb"):
        row = orjson.loads(line)
        row["metadata"] = orjson.dumps(row["metadata"]).decode()
        yield tuple(row[column] for column in COLUMNS)


def batches(file: Path, size: int) -> Iterator[list[tuple[str, ...]]]:
    rest = rows(file)
    while batch := list(islice(rest, size)):
        yield batch


def executemany(dsn: str, file: Path) -> None:
    insert = (
        f"INSERT INTO analytics_events ({', '.join(COLUMNS)}) VALUES ({', '.join(['%s'] * len(COLUMNS))}) "
        "ON CONFLICT (event_id) DO NOTHING"
    )
    with psycopg.connect(dsn) as connection, connection.cursor() as cursor:
        for batch in batches(file, 5000):
            cursor.executemany(insert.encode(), batch)
            connection.commit()


def asyncpg_copy(dsn: str, file: Path) -> None:
    import asyncpg

    def typed(row: tuple[str, ...]) -> tuple[Any, ...]:
        event_id, event_type, timestamp, *people, metadata = row
        return (uuid.UUID(event_id), event_type, datetime.fromisoformat(timestamp),
                *map(uuid.UUID, people), metadata)  # fmt: skip

    async def copy() -> None:
        at = conninfo_to_dict(dsn)
        connection = await asyncpg.connect(host=at["host"], user=at["user"], database=at["dbname"])
        for batch in batches(file, 20_000):
            records = [typed(row) for row in batch]
            await connection.copy_records_to_table("analytics_events", records=records, columns=COLUMNS)
        await connection.close()

    asyncio.run(copy())


def pandas_to_sql(dsn: str, file: Path) -> None:
    import pandas as pd
    import sqlalchemy
    from sqlalchemy.dialects.postgresql import JSONB, UUID

    frame = pd.read_json(file, lines=True)
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    kinds = {
        "metadata": JSONB,
        **dict.fromkeys(("event_id", "user_id", "family_unit_id", "session_id"), UUID),
    }
    frame.to_sql(
        "analytics_events",
        engine,
        if_exists="append",
        index=False,
        method="multi",
        chunksize=2000,
        dtype=kinds,
    )


def dlt_merge(dsn: str, file: Path) -> None:
    """Load into a separate table, with fewer indexes."""
    import dlt

    at = conninfo_to_dict(dsn)
    address = f"postgresql://{at['user']}@/{at['dbname']}?host={at['host']}"

    @dlt.resource(name="merged_events", primary_key="event_id", write_disposition="merge")
    def events() -> Iterator[list[Any]]:
        for batch in batches(file, 10_000):
            yield [dict(zip(COLUMNS, row, strict=True)) for row in batch]

    with tempfile.TemporaryDirectory() as home:
        destination = dlt.destinations.postgres(address)
        dlt.pipeline("bench", destination=destination, dataset_name="dlt", pipelines_dir=home).run(events())


PEERS: dict[str, Callable[[str, Path], None]] = {
    "psycopg executemany, ON CONFLICT": executemany,
    "asyncpg COPY, no duplicates removed": asyncpg_copy,
    "pandas to_sql, no duplicates removed": pandas_to_sql,
    "dlt merge": dlt_merge,
}
