"""The unit files: systemd's own checks, and that the loader works within their restrictions.

Limited to checks that work without a running systemd.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loader.load.database import Connection
from tests.load.lines import STEM, event, joined, metric, number, segment
from tests.processes import (
    HANGS_AFTER,
    LOADER,
    Cli,
    as_root,
    eventually,
    free_port,
    needs_strace,
    needs_systemd,
)

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
SERVICES = ("analytics-loader.service", "analytics-loader@.service")
PRUNE = ("analytics-prune.service", "analytics-prune.timer")
EXPOSURE = 1.5
"""At most, of 10, for what a service is not kept from."""
PR_SET_MDWE = 65


def run(*command: str | Path) -> str:
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path, name: str) -> None:
    program = Path(sys.executable).with_name("loader")
    text = (UNITS / name).read_text().replace("/opt/analytics-spool/bin/loader", str(program))
    (tmp_path / name).write_text(text)
    assert run("systemd-analyze", "verify", tmp_path / name) == ""


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_timer(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("loader")
    for name in PRUNE:
        text = (UNITS / name).read_text().replace("/opt/analytics-spool/bin/loader", str(program))
        (tmp_path / name).write_text(text)
    assert run("systemd-analyze", "verify", *(tmp_path / name for name in PRUNE)) == ""


def test_the_prune_unit_connects_as_the_owner_and_runs_what_the_command_line_accepts(
    cli: Cli, one_connection: Connection
) -> None:
    text = (UNITS / PRUNE[0]).read_text()
    assert "LoadCredential=dsn:/etc/analytics-loader/owner.dsn" in text
    (start,) = re.findall("^ExecStart=(.*)", text, re.MULTILINE)
    program, *arguments = start.split()
    assert program == "/opt/analytics-spool/bin/loader" and "removed: events 0" in cli.owner()(*arguments)
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 0


@needs_systemd
@pytest.mark.parametrize("name", [*SERVICES, PRUNE[0]])
def test_the_unit_is_kept_from_what_it_does_not_need(name: str) -> None:
    report = run("systemd-analyze", "security", "--offline=true", "--no-pager", UNITS / name)
    level = re.search(r"Overall exposure level for .*: ([0-9.]+)", report)
    assert level and float(level[1]) <= EXPOSURE, report


def test_the_template_differs_in_its_names_alone() -> None:
    one, several = ((UNITS / name).read_text().partition("[Unit]")[2] for name in SERVICES)
    named = several.replace("-%i", "").replace(" of spool %i", "")
    assert named.replace("%i.environment", "environment").replace("%i.dsn", "dsn") == one


@needs_systemd
@as_root
def test_the_user_and_the_spool_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        shutil.copy(f"/etc/{name}", tmp_path / "etc")
    run("systemd-sysusers", f"--root={tmp_path}", UNITS / "analytics.sysusers.conf")
    run("systemd-tmpfiles", "--create", f"--root={tmp_path}", UNITS / "analytics.tmpfiles.conf")
    (user,) = re.findall(
        r"^analytics:x:(\d+):(\d+):", (tmp_path / "etc" / "passwd").read_text(), re.MULTILINE
    )
    status = (tmp_path / "var" / "spool" / "analytics").stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2770, int(user[0]), int(user[1]))


def test_nothing_secret_is_on_the_command_line() -> None:
    for name in SERVICES:
        (start,) = re.findall("^ExecStart=(.*)", (UNITS / name).read_text(), re.MULTILINE)
        assert start == "/opt/analytics-spool/bin/loader run"


def work_for(cli: Cli) -> None:
    """Prepare work for every code path: new rows, a duplicate, a reject, a dead writer's segment."""
    segment(cli.spool, 1, event(1), event(1), metric(1), b"{broken")
    (cli.spool / f"{STEM.format(2)}.open").write_bytes(joined(event(2)) + b"\0" * 100)


@needs_systemd
@needs_strace
def test_the_loader_makes_no_system_call_that_the_unit_forbids(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    work_for(cli)
    once = tmp_path / "once"
    trace: list[str | Path] = ["strace", "-f", "-c", "-o"]
    command = [*trace, once, *LOADER, "run", "--once", "--archive", tmp_path / "archive"]
    assert subprocess.run(command, env=cli.environment, capture_output=True).returncode == 3
    with cli.daemon("--metrics-port", str(free_port())) as process:
        eventually(
            lambda: (
                (cli.spool / ".loader.lock")
                .read_text()
                .startswith(f"pid {process.pid} on {os.uname().nodename}, version ")
            )
        )
        tracer = subprocess.Popen(
            [*trace, tmp_path / "daemon", "-p", str(process.pid)], stderr=subprocess.DEVNULL
        )
        eventually(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{process.pid}/status").read_text())
        segment(cli.spool, 3, event(3))
        eventually(lambda: number(one_connection, "SELECT count(*) FROM analytics_events") == 3)
        process.send_signal(signal.SIGTERM)
        tracer.wait(timeout=HANGS_AFTER)
    made = calls(once) | calls(tmp_path / "daemon")
    allowed = group("@system-service") - group("@privileged") - group("@resources")
    assert len(made) > 30 and made <= allowed, made - allowed


def calls(counts: Path) -> set[str]:
    """Return the system calls in a summary of strace."""
    lines = [line.split() for line in counts.read_text().splitlines()]
    return {line[-1] for line in lines if len(line) >= 5 and line[0][0].isdigit()} - {"total"}


def group(name: str) -> set[str]:
    """Return the system calls in a group of systemd."""
    found: set[str] = set()
    for line in map(str.strip, run("systemd-analyze", "syscall-filter", name).splitlines()[1:]):
        if line.startswith("@"):
            found |= group(line)
        elif line and not line.startswith("#"):
            found.add(line)
    return found


def test_the_loader_needs_no_memory_that_is_written_and_executed(
    cli: Cli, one_connection: Connection
) -> None:
    def forbid() -> None:
        ctypes.CDLL(None).prctl(PR_SET_MDWE, 1, 0, 0, 0)  # if the kernel has it, from 6.3 on

    work_for(cli)
    ended = subprocess.run([*LOADER, "run", "--once"], env=cli.environment, preexec_fn=forbid)
    assert ended.returncode == 3 and number(one_connection, "SELECT count(*) FROM analytics_events") == 2
