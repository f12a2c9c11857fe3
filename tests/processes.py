"""Helpers for real processes: run the command line, start the daemon, wait for a condition with a deadline."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import pytest
from psycopg.conninfo import make_conninfo

from tests import command_server

LOADER = (sys.executable, "-m", "loader")
T = TypeVar("T")


def shown(value: object) -> str:
    """Return the id of a parameter, equal in every process, because pytest-xdist compares them."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


HANGS_AFTER = 180.0
"""Seconds that nothing takes, on a loaded machine either: for what has no time of its own."""


def slowness() -> float:
    """Return how much slower the machine is than with idle processors, to scale time limits."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def eventually(condition: Callable[[], T], seconds: float = HANGS_AFTER) -> T:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.005)  # between two checks of the condition
    return value


def environment(**variables: str) -> dict[str, str]:
    """Return the environment with only these of our settings."""
    ours = ("SPOOL_", "LOADER_", "DATABASE_URL", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Allow only one process of the test run in the block. Forked children do not inherit the lock."""
    with path.open("a+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def failing(call: str, error: str, *options: str | Path) -> list[str | Path]:
    """Return a command that runs another one under strace(1) with a failing system call."""
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}"]
    return ["strace", "-D", "-f", "-qq", "-o", "/dev/null", *options, *inject]


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal (proc_pid_status(5)); without one the signal kills it."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root acts as, or on, other users")
needs_systemd = pytest.mark.skipif(
    not (shutil.which("systemd-analyze") and shutil.which("systemd-sysusers")),
    reason="systemd is not installed",
)


def reachable_by_others(directory: Path) -> None:
    """Open a temporary directory, and its parents made private by pytest, to other users."""
    for above in (directory, *directory.parents):
        if above.stat().st_mode & 0o055 != 0o055 and above.stat().st_uid == os.geteuid():
            above.chmod(0o755)


def as_another_user(work: Callable[[], object], user: int = NOBODY, *groups: int) -> int:
    """Run it in a child process of another user; return the exit code, 0 if it did not raise."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.setgroups(groups)
        os.setgid(user)
        os.setuid(user)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


class Cli:
    """The `loader` command with a spool and a database, as a least-privilege role or as the owner."""

    def __init__(self, spool: Path, dsn: str) -> None:
        self.spool = spool
        self.dsn = dsn
        self.environment = environment(SPOOL_DIR=str(spool), LOADER_DSN=dsn)

    def __call__(
        self,
        *arguments: str | Path,
        code: int | None = 0,
        stdin: bytes = b"",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        """Run a command that must exit with `code` (None: any); return its output, errors last."""
        ended = self.run(*map(str, arguments), stdin=stdin, variables=variables)
        printed = ended.stdout.decode() + ended.stderr.decode()
        assert code in (None, ended.returncode), printed
        return printed

    def run(
        self, *arguments: str, stdin: bytes = b"", variables: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command, whatever its exit code."""
        environment = {**self.environment, **variables}
        if any(name.startswith(("LD_", "PYTHON", "LC_", "LANG")) for name in variables):
            # Variables read by the dynamic linker and the interpreter when a process starts.
            return subprocess.run([*LOADER, *arguments], input=stdin, env=environment, capture_output=True)
        return command_server.run(arguments, environment, stdin)

    def owner(self) -> Cli:
        """Return the same command line as the owner of the tables."""
        return Cli(self.spool, make_conninfo(self.dsn, user="postgres"))

    @contextmanager
    def daemon(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run `loader run`; stop it by SIGTERM with exit code 0, unless it was killed before."""
        process = subprocess.Popen([*LOADER, "run", *arguments], env=self.environment, stderr=subprocess.PIPE)
        try:
            eventually(lambda: process.poll() is not None or catches(process.pid, signal.SIGTERM))
            yield process
        finally:
            process.terminate()
            _, log = process.communicate(timeout=HANGS_AFTER)
        assert process.returncode in (0, -signal.SIGKILL), log.decode()
