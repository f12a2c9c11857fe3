"""Fixtures: a real Postgres of each installed version, and a database with the schema for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.load import database
from tests import release
from tests.processes import Cli
from tests.servers import ROLE, VERSIONS, Servers
from tests.servers import database as fresh_database
from tests.servers import servers as shared_servers

hypothesis.settings.register_profile("tests", deadline=None)  # an example may take long on a busy machine
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def of_all_workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory shared by the workers of pytest-xdist."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(autouse=True)
def no_coverage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable coverage in the processes of a test with this mark."""
    if request.node.get_closest_marker("no_coverage"):
        for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def servers(of_all_workers: Path) -> Iterator[Servers]:
    with shared_servers(of_all_workers) as started:
        yield started


@pytest.fixture(scope="session")
def wheel(of_all_workers: Path) -> Path:
    """Return the wheel under test."""
    return release.wheel_under_test(of_all_workers / "wheel")


BETWEEN = VERSIONS[1:-1]
"""Versions that are neither the oldest nor the newest: tested with the long marker."""


@pytest.fixture(
    scope="session",
    params=[pytest.param(each, marks=pytest.mark.long) if each in BETWEEN else each for each in VERSIONS],
)
def server(request: pytest.FixtureRequest, servers: Servers) -> str:
    """Return the DSN of a server, for each version."""
    return servers.dsn(request.param)


@pytest.fixture(scope="session")
def one_server(servers: Servers) -> str:
    """Return the DSN of a server of one version, for tests that do not depend on the version."""
    return servers.dsn(VERSIONS[-1])


@pytest.fixture
def connection(server: str) -> Iterator[database.Connection]:
    """Yield a connection of a least-privilege loader role; see `as_owner`."""
    with fresh_database(server) as dsn, psycopg.connect(dsn) as connection:
        connection.execute(f"SET ROLE {ROLE}".encode())
        connection.commit()
        yield connection
        _end(connection)


@pytest.fixture
def one_connection(one_server: str) -> Iterator[database.Connection]:
    """Yield a connection of the owner, on one version."""
    with fresh_database(one_server) as dsn, psycopg.connect(dsn) as connection:
        yield connection
        _end(connection)


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    directory = tmp_path / "spool"
    directory.mkdir()
    return directory


@pytest.fixture
def cli(one_connection: database.Connection, spool: Path) -> Cli:
    """Return the command line, with an empty spool and the database of `one_connection`."""
    return Cli(spool, make_conninfo(one_connection.info.dsn, user=ROLE))


def _end(connection: database.Connection) -> None:
    """Roll back what a test left open, so that the end of the connection's block does not commit it."""
    if not connection.closed:
        connection.rollback()
