"""Wheels: the one under test, and earlier releases, run with this environment's Python and libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.processes import HANGS_AFTER, Cli, catches, eventually, locked

ROOT = Path(__file__).parents[1]
GIT = ("git", "-c", "safe.directory=*", "-C", ROOT)  # whoever owns the checkout
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@dataclass(frozen=True)
class Release:
    """A release installed in a directory, from which its processes import `spool` and `loader`."""

    directory: Path

    def python(self, *arguments: str | Path) -> list[str | Path]:
        """Return the command that runs Python in the release's directory, the first place it imports from."""
        at = self.directory
        return ["env", f"--chdir={at}", f"PYTHONPATH={at}", sys.executable, *arguments]

    def loader(self, cli: Cli, *arguments: str | Path, code: int = 0) -> str:
        """Run a command with the spool and the database of `cli`; return its output, errors last."""
        command = self.python("-m", "loader", *arguments)
        ended = subprocess.run(command, env=cli.environment, capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    @contextmanager
    def daemon(self, cli: Cli) -> Iterator[subprocess.Popen[bytes]]:
        """Run `loader run`; stop it by SIGTERM with exit code 0."""
        command = self.python("-m", "loader", "run")
        process = subprocess.Popen(command, env=cli.environment, stderr=subprocess.PIPE)
        try:
            eventually(lambda: process.poll() is not None or catches(process.pid, signal.SIGTERM))
            yield process
        finally:
            process.terminate()
            _, log = process.communicate(timeout=HANGS_AFTER)
        assert process.returncode == 0, log.decode()


def exists(commit: str) -> bool:
    """Return whether the repository has the commit, unlike a shallow clone or a copy without .git."""
    found = subprocess.run([*GIT, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    return found.returncode == 0


def install(commit: str, cache: Path) -> Release:
    """Build the wheel of a commit and install it below `cache`, unless already done."""
    directory = cache / f"release-{commit}"
    with locked(cache / "lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=cache) as home:
                _install(commit, Path(home))
                (Path(home) / "installed").rename(directory)
    return Release(directory)


def wheel_under_test(directory: Path) -> Path:
    """Return the wheel that .ci/run has built and installed, or build one of the checkout, once."""
    if built := os.environ.get("TESTED_WHEEL"):
        return Path(built)
    with locked(directory.with_suffix(".lock")):
        return _only(directory) if directory.exists() else _build(ROOT, directory)


def _build(source: Path, directory: Path) -> Path:
    subprocess.run([*PIP, "wheel", "--no-deps", "--wheel-dir", directory, source], check=True)
    return _only(directory)


def _only(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def _install(commit: str, home: Path) -> None:
    archive = home / "source.tar"
    subprocess.run([*GIT, "archive", f"--output={archive}", commit], check=True)
    with tarfile.open(archive) as source:
        source.extractall(home / "source", filter="data")
    wheel = _build(home / "source", home / "wheel")
    subprocess.run([*PIP, "install", "--no-deps", "--target", home / "installed", wheel], check=True)
