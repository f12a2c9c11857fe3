"""Databases with the data of data.py, in each possible state of the rollups."""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from loader.demo import embedded
from loader.load import schema
from loader.load.database import Connection
from tests.see import data
from tests.servers import VERSIONS


@dataclass
class Facts:
    """A database and its rows."""

    connection: Connection
    events: list[data.Event]
    metrics: list[data.Metric]


STATES = ("without rollups", "with rollups", "with touched hours")


@pytest.fixture(
    scope="package",
    params=[
        *((state, None) for state in STATES),
        pytest.param((STATES[-1], VERSIONS[0]), marks=pytest.mark.long),
    ],
    ids=str,
)
def facts(request: pytest.FixtureRequest, one_server: str) -> Iterator[Facts]:
    """Yield a database as after an upgrade, after a refresh, and with late rows in computed hours."""
    state, version = request.param
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(embedded.server(version)) if version else one_server
        connection = stack.enter_context(fresh_database(server))
        events, metrics = data.events(1), data.metrics(1)
        late = len(events) - len(events) // 20
        shuffled = random.Random(2).sample(events, len(events))
        if state == "without rollups":
            connection.execute(
                "INSERT INTO analytics_touched VALUES ('-infinity', 'events'), ('-infinity', 'metrics')"
            )
            data.insert(connection, [*events, *metrics], mark=False)
        elif state == "with rollups":
            data.insert(connection, [*events, *metrics])
            connection.commit()
            data.refresh(connection)
        else:
            data.insert(connection, [*shuffled[:late], *metrics[::2]])
            connection.commit()
            data.refresh(connection)
            data.insert(connection, [*shuffled[late:], *metrics[1::2]])
        connection.commit()
        connection.execute("ANALYZE")
        connection.commit()
        yield Facts(connection, events, metrics)


def fresh_database(server: str) -> Connection:
    """Return a connection to a new database with the schema."""
    name = f"see_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    connection = psycopg.connect(server, dbname=name)
    schema.apply_schema(connection)
    connection.commit()
    return connection
