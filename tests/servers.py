"""The Postgres servers of a test run: one for each version, shared by all workers of pytest-xdist.

The first worker that needs a server starts it and is its parent. The kernel stops the server with its parent
(see loader/demo/embedded.py), so that worker waits before it exits until no other worker uses the server.
Workers never wait for each other in a cycle, because servers are released in the reverse order of their first
use.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal, cast

import psycopg
from psycopg.conninfo import make_conninfo

from loader.demo import embedded
from loader.load import partitions, schema
from tests.processes import locked

DROP_QUESTIONS: Final = (
    "DO $$ BEGIN EXECUTE (SELECT 'DROP FUNCTION ' || string_agg(oid::regprocedure::text, ', ') FROM pg_proc "
    r"WHERE proname LIKE 'analytics\_%'); END $$; "
)
"""A column that a question reads cannot change its type."""
ROLE: Final = "analytics_loader"
VERSIONS: Final = [version for version in (15, 16, 18) if embedded.binaries(version)]
ONE_LAYOUT: Final = cast("schema.Layout | Literal['']", os.environ.get("TEST_LAYOUT", ""))
"""The layout of the tables in every database of the tests; without it, partitioned on one version, else plain."""
_MIXED: Final[dict[int, schema.Layout]] = {15: "partitioned"}
_LAYOUTS: Final[tuple[schema.Layout, ...]] = ("plain", "partitioned")
_OTHERS_SECONDS: Final = 900.0
"""Seconds for which the worker that started a server waits for the others before it stops the server."""


class Servers:
    """The servers used by this process, each started or joined at its first use."""

    def __init__(self, shared: Path, until: ExitStack) -> None:
        self._shared = shared
        self._until = until
        self._dsn: dict[int, str] = {}

    def dsn(self, version: int) -> str:
        if version not in self._dsn:
            self._dsn[version] = self._until.enter_context(_shared_server(version, self._shared))
        return self._dsn[version]


@contextmanager
def servers(shared: Path) -> Iterator[Servers]:
    """Yield the servers of the test run whose workers share the directory `shared`."""
    with ExitStack() as until:
        yield Servers(shared, until)


@contextmanager
def database(server: str, template: str | None = None) -> Iterator[str]:
    """Yield the DSN of a database with the schema and the role, dropped with all its connections at the end.

    A copy of the template and its removal take 0.85 of the time that applying the schema does; a cluster with
    every database of a run took half a minute to remove.
    """
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        template = template or _layout(admin.info.server_version)
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextmanager
def _shared_server(version: int, shared: Path) -> Iterator[str]:
    # POSIX locks are not inherited by forked children.
    known = shared / f"postgres-{version}.dsn"
    starting, using = (shared / f"postgres-{version}.{name}" for name in ("starting", "using"))
    with ExitStack() as own, using.open("a+b") as users:
        with locked(starting):
            started = not known.exists()
            if started:
                server = own.enter_context(embedded.server(version))
                _make_templates(server)
                known.write_text(server)
            fcntl.lockf(users, fcntl.LOCK_SH)
        yield known.read_text()
        fcntl.lockf(users, fcntl.LOCK_UN)
        if started:
            _wait_for_the_others(users.fileno(), starting, known)


def _wait_for_the_others(users: int, starting: Path, known: Path) -> None:
    deadline = time.monotonic() + _OTHERS_SECONDS
    while time.monotonic() < deadline:
        with locked(starting):
            try:
                fcntl.lockf(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # another worker still uses it
            else:
                known.unlink()
                return
        time.sleep(0.05)  # between two attempts


def _layout(server_version: int) -> schema.Layout:
    """Return the layout of a test's tables, which is also the name of their template."""
    return ONE_LAYOUT or _MIXED.get(server_version // 10000, "plain")


def _make_templates(server: str) -> None:
    for layout in _LAYOUTS:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {layout}".encode())
        with psycopg.connect(server, dbname=layout) as connection:
            schema.apply_schema(connection, layout=layout, role=ROLE)
            partitions.make(connection)
