"""A real Postgres of each version that is here, with the schema in a database of its own for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.demo import embedded
from loader.load import database, schema
from tests.processes import Cli

ROLE = "analytics_loader"
VERSIONS = [version for version in (15, 16, 18) if embedded.binaries(version)]


@pytest.fixture(scope="session", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with embedded.server(request.param) as dsn:
        yield dsn


@pytest.fixture
def connection(server: str) -> Iterator[database.Connection]:
    """Acts as a role that may load and nothing else; see `as_owner`."""
    for connection in _fresh_database(server):
        connection.execute(f"SET ROLE {ROLE}".encode())
        connection.commit()
        yield connection


@pytest.fixture(scope="session")
def one_server() -> Iterator[str]:
    with embedded.server(VERSIONS[-1]) as dsn:
        yield dsn


@pytest.fixture
def one_connection(one_server: str) -> Iterator[database.Connection]:
    """The owner's, on one version: for what does not depend on it."""
    yield from _fresh_database(one_server)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    directory = tmp_path / "spool"
    directory.mkdir()
    return directory


@pytest.fixture
def cli(one_connection: database.Connection, spool: Path) -> Cli:
    """The command line, with an empty spool and the database of `one_connection`."""
    return Cli(spool, make_conninfo(one_connection.info.dsn, user=ROLE))


def _fresh_database(server: str) -> Iterator[database.Connection]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    with psycopg.connect(server, dbname=name) as connection:
        schema.apply_schema(connection, role=ROLE)
        connection.commit()
        yield connection
        if not connection.closed:
            connection.rollback()
