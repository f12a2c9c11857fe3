"""Databases with the data of data.py, in each state in which a reader may find the rollups."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from loader.load import schema
from loader.load.database import Connection
from tests.see import data


@dataclass
class Facts:
    """A database and the rows in it."""

    connection: Connection
    events: list[data.Event]
    metrics: list[data.Metric]


STATES = ("without rollups", "with rollups", "with touched hours")


@pytest.fixture(scope="package", params=STATES)
def facts(request: pytest.FixtureRequest, one_server: str) -> Iterator[Facts]:
    """As after an upgrade, after a refresh, and with rows that came later into hours that were computed."""
    with _database(one_server) as connection:
        events, metrics = data.events(1), data.metrics(1)
        late = len(events) - len(events) // 20
        shuffled = sorted(events, key=lambda event: hash((event.at, event.user.int)))
        if request.param == "without rollups":
            connection.execute(
                "INSERT INTO analytics_touched VALUES ('-infinity', 'events'), ('-infinity', 'metrics')"
            )
            data.insert(connection, [*events, *metrics], mark=False)
        elif request.param == "with rollups":
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


def _database(server: str) -> psycopg.Connection[tuple[object, ...]]:
    name = f"see_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    connection = psycopg.connect(server, dbname=name)
    schema.apply_schema(connection)
    connection.commit()
    return connection
