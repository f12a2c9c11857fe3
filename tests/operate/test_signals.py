"""SIGHUP means reload under a service manager, and a closed terminal otherwise."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from loader.load.database import Connection
from tests.load.lines import event, number, segment
from tests.processes import LOADER, Cli, eventually

EVENTS = "SELECT count(*) FROM analytics_events"


def on_a_terminal(command: Sequence[str], environment: dict[str, str]) -> tuple[int, int]:
    """Start a command as a foreground job; return its process and the other end of its terminal."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
        os.execvpe(command[0], list(command), environment)
    return child, terminal


def ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def test_closing_the_terminal_ends_a_loader_in_order(cli: Cli, one_connection: Connection) -> None:
    child, terminal = on_a_terminal([*LOADER, "run"], cli.environment)
    segment(cli.spool, 1, event(1))
    eventually(lambda: number(one_connection, EVENTS) == 1)
    os.close(terminal)
    assert eventually(lambda: (ended(child) is not None) or None)


def test_closing_the_terminal_ends_the_demo_and_all_it_started(cli: Cli, tmp_path: Path) -> None:
    environment = cli.environment | {"TMPDIR": str(tmp_path / "t")}
    (tmp_path / "t").mkdir(mode=0o755)
    (tmp_path.parent).chmod(0o755)
    child, terminal = on_a_terminal([*LOADER, "demo", "--dsn", cli.owner().dsn], environment)
    eventually(lambda: list((tmp_path / "t").glob("analytics-spool-*/*.open")), 60)
    os.close(terminal)
    eventually(lambda: ended(child) is not None)
    assert not list((tmp_path / "t").glob("analytics-spool-*"))
    running = subprocess.run(["pgrep", "-f", str(tmp_path / "t")], capture_output=True, text=True)
    assert not running.stdout


@pytest.mark.parametrize("ignored", [True, False])
def test_nohup_keeps_a_loader_and_a_hangup_without_it_ends_it(
    cli: Cli, one_connection: Connection, ignored: bool
) -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == 'True' "
        "else signal.SIG_DFL); os.execv(sys.executable, [sys.executable, '-m', 'loader', 'run'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(ignored)], env=cli.environment)
    segment(cli.spool, 1, event(1))
    eventually(lambda: number(one_connection, EVENTS) == 1)
    process.send_signal(signal.SIGHUP)
    if ignored:
        segment(cli.spool, 2, event(2))
        eventually(lambda: number(one_connection, EVENTS) == 2)
        process.terminate()
    assert process.wait(timeout=20) == 0
