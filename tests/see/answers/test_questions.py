"""The questions of loader/see/README.md: every statement and command runs; the training set does not see the future."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.cli import init
from tests.processes import environment
from tests.see.answers.conftest import READER, World

README = (files("loader") / "see" / "README.md").read_text("utf-8")
QUESTIONS = re.findall(
    r"^### (.+?)\n.*?```sql\n(.*?)```\n\n```sh\n(.*?)\n```", README, re.DOTALL | re.MULTILINE
)
OTHERS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("loader ask")
]


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10 == README.count("```sql") == README.count("\n### ")


@pytest.mark.parametrize(("title", "statement", "command"), QUESTIONS, ids=[title for title, *_ in QUESTIONS])
def test_every_question_has_an_answer_in_sql_and_on_the_command_line(
    world: World, tmp_path: Path, title: str, statement: str, command: str
) -> None:
    with psycopg.connect(make_conninfo(world.dsn, user=READER)) as connection:
        rows = connection.execute(statement.encode()).fetchall()
    assert rows or "notice" in title, "an unusual hour is not certain"
    run(world, command, tmp_path)


@pytest.mark.parametrize("command", OTHERS)
def test_every_other_command_runs(world: World, tmp_path: Path, command: str) -> None:
    as_owner = command.startswith("loader init")
    if as_owner and "--reader" not in {each for option in init.command.params for each in option.opts}:
        pytest.skip("this version of init makes no reader: loader.load.schema does")
    run(world, command, tmp_path, user="postgres" if as_owner else READER)


def run(world: World, command: str, home: Path, user: str = READER) -> None:
    variables = environment(LOADER_DSN=make_conninfo(world.dsn, user=user))
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    ended = subprocess.run(["bash", "-c", command], cwd=home, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_training_set_does_not_change_when_later_events_come(world: World) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    rows_as_json = f"SELECT to_jsonb(x) AS t FROM ({names['TRAINING_SET']}) x"
    features = f"SELECT (t - 'stayed')::text FROM ({rows_as_json}) y ORDER BY 1"
    labels = f"SELECT count(*) FILTER (WHERE stayed), count(*) FROM ({names['TRAINING_SET']}) x"
    with psycopg.connect(world.dsn) as connection:
        before = connection.execute(features.encode()).fetchall()
        ((stayed, rows),) = connection.execute(labels.encode()).fetchall()
        assert 0 < stayed < rows == len(before)
        connection.execute(
            "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, "
            "metadata) "
            "SELECT gen_random_uuid(), 'feed_viewed', date_trunc('week', now(), 'UTC') - interval '2 weeks', "
            "user_id, family_unit_id, '{}' FROM analytics_events"
        )
        assert connection.execute(features.encode()).fetchall() == before
        connection.rollback()
