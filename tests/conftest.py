"""A real Postgres of each version that is here, with the schema in a database of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import psycopg
import pytest

from loader import database, embedded


@pytest.fixture(scope="session", params=[v for v in (15, 16, 18) if embedded.binaries(v)])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with embedded.server(request.param) as dsn:
        yield dsn


@pytest.fixture
def connection(server: str) -> Iterator[database.Connection]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    with psycopg.connect(server, dbname=name) as connection:
        database.apply_schema(connection)
        connection.commit()
        yield connection
        connection.rollback()
