"""A Debian machine with systemd as process 1, in its own namespaces: made by debootstrap, booted by
systemd-nspawn(1).

It shares the kernel with the host and nothing else: no network, its own files, users, processes and service
manager. It runs below one process of the test, in a mount and a PID namespace: its processes and mounts end with that
process, which the kernel ends with the test.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tests.processes import HANGS_AFTER, eventually

SUITE: Final = "bookworm"
"""Debian 12: Python 3.11, PostgreSQL 15, systemd 252."""
PACKAGES: Final = ("systemd-sysv", "dbus", "python3-venv", "postgresql")
MADE_BEFORE: Final = "TEST_DEBIAN_ROOT"
"""The environment variable that names a directory in which debootstrap has made such a system."""
_TOOLS: Final = ("debootstrap", "systemd-nspawn", "nsenter", "setpriv", "unshare")
_REBOOT: Final = 133
"""The exit code of `systemd-nspawn --keep-unit` if the machine is to be started again (its source,
`run_container`)."""
_SETTLED: Final = ("running", "degraded")
_HIERARCHIES: Final = tuple(Path("/sys/fs/cgroup", name) for name in ("systemd", "unified", ""))
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def obstacle() -> str:
    """Return why no machine can be booted here, or "" if one can."""
    if os.geteuid() != 0:
        return "only root boots a machine"
    missing = [name for name in _TOOLS if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def make_root(directory: Path) -> None:
    """Install a fresh Debian into the directory, from the mirror that apt is configured for."""
    if made := os.environ.get(MADE_BEFORE):
        subprocess.run(["cp", "-a", "--reflink=auto", f"{made}/.", directory], check=True)
        return
    include = f"--include={','.join(PACKAGES)}"
    command: list[str | Path] = ["debootstrap", "--variant=minbase", include, SUITE, directory, *_mirror()]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout[-4000:]


def _mirror() -> list[str]:
    """Return apt's first mirror for the release, or debootstrap's default."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Codename: {SUITE}"],
        capture_output=True,
        text=True,
    )
    return found.stdout.split()[:1]


class Machine:
    """A machine whose files are below `root`; `shared` is read-only in it at /shared."""

    def __init__(self, root: Path, shared: Path) -> None:
        self._root = root
        self._shared = shared
        self._name = f"boot-{uuid.uuid4().hex[:8]}"
        self._cgroups = [each / self._name for each in _HIERARCHIES if (each / "cgroup.procs").exists()]
        self._log = root.parent / "console.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def boot(self) -> None:
        """Start the machine, and wait until the service manager has started everything."""
        for cgroup in self._cgroups:
            cgroup.mkdir(exist_ok=True)
        dying_with_us = ["setpriv", "--pdeathsig=KILL"]
        unshare = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*dying_with_us, *unshare, "sh", "-euc", self._start()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._leader = eventually(self._find_leader)
        eventually(self._is_settled)

    def _start(self) -> str:
        nspawn = [
            "systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--private-network",
            "--link-journal=no", "--resolv-conf=off", "--timezone=off", "--console=pipe",
            f"--machine={self._name}", f"--directory={self._root}", f"--bind-ro={self._shared}:/shared",
        ]  # fmt: skip
        enter = [f"echo $$ > {shlex.quote(str(cgroup / 'cgroup.procs'))}" for cgroup in self._cgroups]
        steps = ["mkdir -p /run/systemd/nspawn", "mount -t tmpfs tmpfs /run/systemd/nspawn"]
        return "\n".join([*enter, *steps, f"exec {shlex.join(nspawn)}"])

    def _find_leader(self) -> int:
        """Return the machine's process 1, a grandchild that has become systemd; 0 if there is none yet."""
        assert self._process is not None and self._process.poll() is None, self._log.read_text()
        for nspawn in _children(self._process.pid):
            for leader in _children(nspawn):
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{leader}/comm").read_text() == "systemd\n":
                        return leader
        return 0

    def _is_settled(self) -> bool:
        ended = self._enter(["systemctl", "is-system-running"])
        return ended.stdout.strip() in _SETTLED

    def reboot(self) -> None:
        """Restart it in order, as `systemctl reboot` does."""
        assert self._process is not None
        self._enter(["systemctl", "reboot"])
        assert self._process.wait(HANGS_AFTER) == _REBOOT, self._log.read_text()
        self.boot()

    def close(self) -> None:
        """Stop the machine and everything in it, even if it was not booted."""
        if self._process is not None:
            # The process is the parent of process 1 of a PID namespace, which ends with it (--kill-child).
            self._process.kill()
            self._process.wait()
        eventually(lambda: all(_is_removed(cgroup) for cgroup in self._cgroups))

    def __call__(self, command: str, *, code: int | None = 0) -> str:
        """Run shell commands as root, which must end with `code` (None: with any); return all they printed."""
        ended = self._enter(["bash", "-c", command])
        printed = ended.stdout + ended.stderr
        assert code in (None, ended.returncode), f"{command}: {ended.returncode}: {printed}\n{self._state()}"
        return printed

    def _enter(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        return subprocess.run(
            ["nsenter", f"--target={self._leader}", *namespaces, "env", "-i", f"PATH={_PATH}", "HOME=/root",
             "LANG=C.UTF-8", *command],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=HANGS_AFTER,
        )  # fmt: skip

    def eventually(self, command: str, expected: str, seconds: float = HANGS_AFTER) -> None:
        """Repeat commands until they print what is expected."""
        deadline = time.monotonic() + seconds
        while (printed := self(command, code=None).strip()) != expected:
            assert time.monotonic() < deadline, f"{command}: {printed}, not {expected}\n{self._state()}"
            time.sleep(0.2)  # between two checks: each starts several processes

    def _state(self) -> str:
        return self("systemctl status --no-pager 'analytics-loader*'; journalctl -n 60 --no-pager", code=None)


@contextlib.contextmanager
def booted(root: Path, shared: Path) -> Iterator[Machine]:
    """Yield a running machine, and end it."""
    machine = Machine(root, shared)
    try:
        machine.boot()
        yield machine
    finally:
        machine.close()


def _children(pid: int) -> list[int]:
    """Return the children of a process (proc_pid_children(5))."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _is_removed(cgroup: Path) -> bool:
    """Remove a control group and those below it, once their processes have ended; return whether this succeeded."""
    with contextlib.suppress(OSError):
        for directory, _, _ in os.walk(cgroup, topdown=False):
            Path(directory).rmdir()
    return not cgroup.exists()
