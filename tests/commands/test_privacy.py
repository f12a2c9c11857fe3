"""Every command and statement of the page for a data protection officer runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
import uuid
from pathlib import Path

import psycopg

from loader.load.database import Connection
from loader.operate.erase import UNREACHED
from tests.documents import Document
from tests.load.lines import event, number, rows, segment
from tests.operate.erase import story
from tests.processes import Cli

PAGE = Document("loader/PRIVACY.md").text
PERSON = "0190163d-8694-739b-aea5-966c26f8ad91"
FAMILY = "0190163d-8694-739b-aea5-966c26f8ad92"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_command_runs(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    segment(cli.spool, 1, *[event(n, family_unit_id=FAMILY) for n in range(3)], event(4, user_id=FAMILY))
    cli("run", "--once", "--archive", tmp_path / "archive")
    bin_directory = str(Path(sys.executable).parent)
    variables = cli.owner().environment | {"PATH": f"{bin_directory}:{cli.environment['PATH']}"}
    commands = [line for block in snippets("sh") for line in block.splitlines()]
    assert len(commands) == 5
    printed = {}
    for command in commands:
        ended = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        printed[command] = ended.stdout
    assert "rows 4, spool lines 0, reject lines 0, archive lines 4" in printed[commands[0]]
    assert "would be erased: people 1, events 4" in printed[commands[1]]
    assert "erased: people 1, events 4" in printed[commands[2]] and ", 0 hits" in printed[commands[2]]
    assert all(unreached in printed[commands[2]] for unreached in UNREACHED)
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 0


def test_every_statement_runs(cli: Cli, one_connection: Connection) -> None:
    segment(cli.spool, 1, event(1, metadata={"n": 1}))
    cli("run", "--once")
    one_connection.execute("CREATE ROLE application")
    one_connection.execute("CREATE SCHEMA auth; CREATE TABLE auth.users (id UUID PRIMARY KEY)")
    one_connection.execute(f"INSERT INTO auth.users VALUES ('{PERSON}')".encode())
    one_connection.commit()
    try:
        cli.owner()("init")
        with psycopg.connect(one_connection.info.dsn, autocommit=True) as application:
            assert len(snippets("sql")) == 2
            for block in snippets("sql"):
                application.execute(block.encode())
        assert story.found_in_tables(one_connection, uuid.UUID(PERSON)) == []
        assert rows(one_connection, "SELECT * FROM auth.users") == []
    finally:
        one_connection.execute("DROP OWNED BY application; DROP ROLE application")
        one_connection.commit()


def test_the_page_has_every_table(one_connection: Connection) -> None:
    tables = rows(
        one_connection, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname LIKE 'analytics%'"
    )
    without_people = {
        "analytics_schema",
        "analytics_settings",
        "analytics_touched",
        "analytics_sealed",
        "analytics_erasure_keys",
    }
    assert {name for (name,) in tables} - without_people <= set(re.findall(r"`(analytics_\w+)`", PAGE))
    assert "loader/PRIVACY.md" in Document("README.md").text
