"""Every command: help with examples that run, completion in a shell, JSON, and what it prints.

transcript.txt has the output of a short session; UPDATE_TRANSCRIPT=1 rewrites it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import pytest

from loader.cli import main
from loader.load.database import Connection
from tests.load.lines import ID, STEM, event, joined, metric, number, segment
from tests.processes import HANGS_AFTER, LOADER, Cli, eventually

TRANSCRIPT = Path(__file__).with_name("transcript.txt")
BIN = str(Path(sys.executable).parent)
EVENTS = "SELECT count(*) FROM analytics_events"
MANY = 100_000


def every(command: click.Command, name: str = "loader") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for below in command.list_commands(context):
            each = command.get_command(context, below)
            assert each is not None
            yield from every(each, f"{name} {below}")


COMMANDS = dict(every(main.cli))
FACTS = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)]
NO_FACTS = {"loader rejects export", "loader demo", "loader tail"}


def examples(command: click.Command) -> list[str]:
    text = command.get_help(click.Context(command))
    return re.findall(r"^ {4,}((?:loader|zcat) .*)$", text, re.MULTILINE)


def with_program(cli: Cli) -> dict[str, str]:
    return cli.owner().environment | {"PATH": f"{BIN}:{cli.environment['PATH']}"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    assert examples(COMMANDS[name]) and COMMANDS[name].get_short_help_str()


def test_the_list_of_commands_has_their_short_help() -> None:
    shown = {name: COMMANDS[f"loader {name}"].get_short_help_str(limit=100) for name in main.COMMANDS}
    assert shown == main.COMMANDS


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_options_of_a_command_are_known_without_a_driver(name: str) -> None:
    """`--help`, completion and an unknown option must respond quickly."""
    heavy = "{'psycopg', 'rich', 'pyarrow', 'vl_convert', 'jinja2'}"
    code = f"import loader.cli.{name}, sys; print(*{heavy} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


EXAMPLES = {each for command in COMMANDS.values() for each in examples(command)}
ELSEWHERE = {
    "loader demo",
    "loader demo --keep",
    "loader init --layout partitioned",
}  # they have separate tests


@pytest.mark.parametrize("example", sorted(EXAMPLES - ELSEWHERE))
def test_every_example_runs(cli: Cli, tmp_path: Path, example: str) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.ndjson").write_bytes(joined(event(1)))
    (tmp_path / "older.ndjson.gz").write_bytes(gzip.compress(joined(event(2))))
    command = example.replace("/var/lib", str(tmp_path))
    daemon = command.startswith("loader run") and "--once" not in command
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}" if daemon else command],
        cwd=tmp_path,
        env=with_program(cli),
        stderr=subprocess.PIPE,
    )
    if daemon:
        eventually(lambda: (cli.spool / ".loader.lock").exists())
        process.terminate()
    assert process.communicate(timeout=HANGS_AFTER) and process.returncode == 0


def completed(cli: Cli, *words: str) -> set[str]:
    """Return bash's completions of the last word."""
    script = (
        'eval "$(_LOADER_COMPLETE=bash_source loader)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_loader_completion loader; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "-c", script, "-", *words]
    return set(
        subprocess.check_output(command, env=with_program(cli), text=True, stderr=subprocess.DEVNULL).split()
    )


def test_commands_options_and_reject_files_complete_in_a_shell(cli: Cli) -> None:
    path = segment(cli.spool, 1, b"{broken")
    cli("run", "--once", code=3)
    assert completed(cli, "loader", "") == set(main.COMMANDS)
    assert completed(cli, "loader", "rejects", "re") == {"retry"}
    assert completed(cli, "loader", "backfill", "--d") == {"--dsn", "--dry-run"}
    (name,) = completed(cli, "loader", "rejects", "show", "2026")
    assert name.startswith(f"{path.stem}-0-")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_their_completion(cli: Cli, shell: str) -> None:
    environment = with_program(cli) | {"_LOADER_COMPLETE": f"{shell}_source"}
    assert "_LOADER_COMPLETE" in subprocess.check_output(["loader"], env=environment, text=True)


@pytest.mark.parametrize("name", sorted(set(FACTS) - NO_FACTS))
def test_every_command_that_prints_facts_answers_in_json(name: str) -> None:
    assert any("--json" in option.opts for option in COMMANDS[name].params)


def story(cli: Cli, home: Path) -> Iterator[str]:
    """Yield commands in the order of a first session; their output depends on earlier ones."""
    cli.spool.chmod(0o2770)
    yield "init"
    yield "init --role analytics_loader --json"
    yield "status"
    segment(cli.spool, 1, event(1), event(2), event(2), metric(1), b"{broken")
    (cli.spool / f"{STEM.format(2)}.open").write_bytes(joined(event(3)) + b"\0" * 100)
    (cli.spool / "notes.ndjson").write_text("mine")
    yield "run --once"
    yield "run --once --json"
    yield "rejects list"
    yield "rejects list --json"
    yield "rejects show"
    yield "rejects show --json"
    yield "rejects retry"
    yield "rejects retry --json"
    (home / "old.ndjson").write_bytes(joined(event(4), b"no line", event(1)))
    yield f"backfill --dry-run {home}/old.ndjson"
    yield f"backfill {home}/old.ndjson"
    yield f"backfill --json {home}/old.ndjson"
    yield f"backfill --dry-run --json {home}/old.ndjson"
    yield "status"
    yield "status --json"
    yield "doctor"
    yield "doctor --json"
    yield "prune --older-than 1w --dry-run"
    yield "prune --older-than 1w"
    yield "prune --older-than 1w --json"
    segment(cli.spool, 3, event(5))
    yield f"erase --user {ID} --dry-run --json"
    yield f"erase --user {ID} --archive {home}/archive --verify"
    yield f"export {home}/somebody.ndjson --user {ID}"
    yield "run --once"


VOLATILE = (
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.0-9]*(Z|\+00:?00)", "TIME"),
    (r"test_[0-9a-f]{32}", "DATABASE"),
    (r"(?<=@)/\S*/analytics-pg-\w+", "HOST"),
    (r"PostgreSQL \d+", "PostgreSQL N"),
    (r"(lag_seconds\W+|rows_per_second\W+|touched_seconds\W+)[\d.]+", r"\1N"),
    (r"[\d.]+ rows/s", "N rows/s"),
    (r"(touched +)[\d.]+ d\b", r"\1N d"),
    (r"[\d.]+ (s|min|h|d) ago", "N ago"),
    (r"[\d.]+ GB of [\d.]+ GB", "N GB of N GB"),
    (r"\d+ instances, \d+ watches", "N instances, N watches"),
    (r"\S+:\S+, mode 2770", "OWNER:GROUP, mode 2770"),
    (r"[1-9]\d* bytes", "N bytes"),
    (r"[─━]+", "─"),
    (r"[┏┳┓┡╇┩┌┬┐└┴┘├┼┤]", "+"),
    (r" +", " "),
)


def test_what_the_commands_print(cli: Cli, tmp_path: Path) -> None:
    printed = []
    for command in story(cli, tmp_path):
        ended = cli.owner().run(*shlex.split(command))
        code = f" (exit {ended.returncode})" if ended.returncode else ""
        printed.append(f"$ loader {command}{code}\n{ended.stdout.decode()}{ended.stderr.decode()}")
    text = "\n".join(printed).replace(str(cli.spool), "SPOOL").replace(str(tmp_path), "HOME")
    for pattern, name in VOLATILE:
        text = re.sub(pattern, name, text)
    if os.environ.get("UPDATE_TRANSCRIPT"):
        TRANSCRIPT.write_text(text)
    assert text == TRANSCRIPT.read_text()


def on_a_terminal(
    cli: Cli, *arguments: str, interrupt_when: Callable[[], object] = lambda: False
) -> tuple[int, str]:
    """Run a command with its output on a terminal; send Ctrl-C once a condition holds."""
    terminal, line = pty.openpty()
    environment = cli.owner().environment | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([*LOADER, *arguments], env=environment, stdin=line, stdout=line, stderr=line)
    os.close(line)
    text, interrupted = b"", False
    with contextlib.suppress(OSError):  # EIO: the last process that had it open has exited
        while True:
            if select.select([terminal], [], [], 0.01)[0]:
                text += os.read(terminal, 4096)
            if not interrupted and interrupt_when():
                process.send_signal(signal.SIGINT)
                interrupted = True
    os.close(terminal)
    return process.wait(timeout=HANGS_AFTER), text.decode()


def test_what_takes_long_has_a_bar_on_a_terminal_and_none_elsewhere(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "a.ndjson"
    file.write_bytes(joined(*[event(n) for n in range(2000)]))
    segment(cli.spool, 1, *[event(n) for n in range(2000, 4000)], b"{broken")
    for arguments, word in (
        (["backfill", str(file)], "reading"),
        (["run", "--once"], "loading"),
        (["rejects", "retry"], "files"),
        (["prune", "--older-than", "1d"], "rows"),
    ):
        _, shown = on_a_terminal(cli, *arguments)
        assert f"{word} " in shown and "━" in shown and "100%" not in cli.owner()("status"), arguments
    file.write_bytes(joined(*[event(n) for n in range(5000, 7000)]))
    assert "━" not in cli("backfill", file)


def test_log_lines_are_readable_on_a_terminal(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute("INSERT INTO analytics_schema (version) VALUES (9)")
    one_connection.commit()
    segment(cli.spool, 1, event(1))
    (cli.spool / "\x1b]0;owned\x07.ndjson").write_bytes(b"")
    _, shown = on_a_terminal(cli, "run", "--once")
    assert "\x1b]0" not in shown and r"\x1b]0;owned\x07.ndjson" in shown
    assert re.search(r"\d{4}-\d\d-\d\d \S+ WARNING schema version 9 is newer", shown) and "{" not in shown


def test_no_line_that_is_printed_as_it_is_steers_a_terminal(cli: Cli) -> None:
    line = event(1).replace(
        b"memory_posted", "\x9b2J".encode()
    )  # a control character that JSON need not escape
    segment(cli.spool, 1, line)
    assert cli("tail") == line.decode() + "\n"
    _, shown = on_a_terminal(cli, "tail")
    assert "\x9b" not in shown and r"\x9b2J" in shown


@pytest.mark.parametrize("command", ["backfill", "run --once"])
def test_an_interrupted_load_reports_how_to_continue_and_can_continue(
    cli: Cli, one_connection: Connection, tmp_path: Path, command: str
) -> None:
    arguments = command.split()
    if command == "backfill":
        (tmp_path / "a.ndjson").write_bytes(joined(*[event(n) for n in range(MANY)]))
        arguments.append(str(tmp_path / "a.ndjson"))
    else:
        for n in range(20):
            segment(cli.spool, n + 1, *[event(n * MANY // 20 + i) for i in range(MANY // 20)])
    begun = partial(number, one_connection, EVENTS)
    code, shown = on_a_terminal(cli, *arguments, "--workers", "1", interrupt_when=begun)
    assert code == 1 and "run the command again to continue" in shown, shown
    left = number(one_connection, EVENTS)
    assert 0 < left < MANY and f"events {left}" in shown
    cli(*arguments)
    assert number(one_connection, EVENTS) == MANY
    assert number(one_connection, "SELECT sum(events) FROM analytics_loads") == MANY


def test_the_json_of_a_load_has_every_count(cli: Cli) -> None:
    segment(cli.spool, 1, event(1), b"{broken")
    printed = json.loads(cli("run", "--once", "--json", code=3))
    assert printed == {
        "files": 1, "lines": 2, "events": 1, "metrics": 0, "duplicates": 0, "rejected": 1, "erased": 0,
        "expired": 0, "known": 0, "failures": {},
    }  # fmt: skip
