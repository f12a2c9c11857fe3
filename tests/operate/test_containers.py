"""The compose file and the pod of loader/README.md, run as processes with their users, groups, modes and mounts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from loader.load.database import Connection
from tests import documents
from tests.load.lines import number
from tests.processes import (
    HANGS_AFTER,
    LOADER,
    Cli,
    as_root,
    environment,
    eventually,
    free_port,
    reachable_by_others,
)

GROUP = 10000
EMIT = """
import uuid
from spool import get_emitter
for n in range(100):
    assert get_emitter().emit_event(event_type="seen", user_id=uuid.uuid4(), family_unit_id=uuid.uuid4())
"""


@dataclass(frozen=True)
class Container:
    """A container: its command, its user and its environment."""

    command: tuple[str, ...]
    user: int
    group: int
    variables: Mapping[str, str]

    def start(self, **more: str) -> subprocess.Popen[str]:
        become = ["setpriv", f"--reuid={self.user}", f"--regid={self.group}", f"--groups={GROUP}"]
        if self.user:
            become += ["--no-new-privs", "--bounding-set=-all"]
        variables = environment(**{**self.variables, **more})
        command = (*LOADER, *self.command[1:]) if self.command[0] == "loader" else self.command
        return subprocess.Popen(
            [*become, *command], env=variables, stderr=subprocess.PIPE, text=True, umask=0o022
        )

    def run(self, **more: str) -> None:
        process = self.start(**more)
        _, errors = process.communicate(timeout=HANGS_AFTER)
        assert process.returncode == 0, errors


def documented(name: str) -> Any:
    """A file of loader/README.md."""
    yaml = pytest.importorskip("yaml")
    (text,) = (each for each in documents.LOADER.snippets("yaml") if each.startswith(f"# {name}\n"))
    return yaml.safe_load(text)


def of_compose() -> dict[str, Container]:
    found = {}
    for name, each in documented("compose.yaml")["services"].items():
        user, group = map(int, each["user"].split(":"))
        command = tuple(each.get("command", ()))
        found[name] = Container(command, user, group, each.get("environment", {}))
    return found


def of_pod() -> dict[str, Container]:
    spec = documented("pod.yaml")["spec"]
    return {
        each["name"]: Container(
            tuple(each.get("command", ())), each["securityContext"]["runAsUser"],
            spec["securityContext"]["runAsGroup"],
            {one["name"]: one["value"] for one in each.get("env", ()) if "value" in one},
        )
        for each in spec["initContainers"] + spec["containers"]
    }  # fmt: skip


@contextmanager
def volume(path: Path, mode: int, group: int) -> Iterator[Path]:
    """A file system of its own, owned by root, as the runtime makes it."""
    path.mkdir()
    options = f"mode={mode:04o},gid={group},size=64m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def can_mount() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def others_run_python() -> bool:
    """Whether the interpreter and the packages are open to the users of the containers."""
    become = ["setpriv", "--reuid=10001", f"--regid={GROUP}", "--clear-groups"]
    return (
        subprocess.run([*become, sys.executable, "-c", "import loader"], capture_output=True).returncode == 0
    )


def health(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture
def dsn(cli: Cli, one_connection: Connection) -> str:
    """The database, whose socket the containers' users reach."""
    Path(str(conninfo_to_dict(cli.dsn)["host"])).chmod(0o711)
    return cli.dsn


@pytest.fixture
def place(tmp_path: Path) -> Path:
    if os.geteuid() == 0 and not can_mount():
        pytest.skip("mounts are not allowed here")
    if os.geteuid() == 0 and not others_run_python():
        pytest.skip("other users cannot run this interpreter")
    reachable_by_others(tmp_path)
    return tmp_path / "volume"


@as_root
@pytest.mark.no_coverage
@pytest.mark.parametrize(
    ("kind", "mode", "group"), [("compose", 0o755, 0), ("pod", 0o2777, GROUP), ("pod", 0o777, 0)]
)
def test_the_documented_containers_load_what_the_application_emits(
    place: Path, dsn: str, one_connection: Connection, kind: str, mode: int, group: int
) -> None:
    containers = of_compose() if kind == "compose" else of_pod()
    port = str(free_port())
    with volume(place, mode, group) as mounted:
        inside = {"SPOOL_DIR": str(mounted / "analytics")}
        made = containers["spool"]
        command = tuple(word.replace("/spool", str(mounted)) for word in made.command)
        for _ in range(2):  # a pod that starts again makes it again
            Container(command, made.user, made.group, made.variables).run()
        loader = containers["loader"].start(**inside, LOADER_DSN=dsn, LOADER_METRICS_PORT=port)
        try:
            eventually(lambda: health(int(port)) == 200 or loader.poll() is not None)
            application = containers["application"]
            emitting = (sys.executable, "-c", EMIT)
            Container(emitting, application.user, application.group, application.variables).run(**inside)
            eventually(lambda: number(one_connection, "SELECT count(*) FROM analytics_events") == 100)
        finally:
            loader.terminate()
            _, log = loader.communicate(timeout=HANGS_AFTER)
        assert loader.returncode == 0, log
        assert not [line for line in map(json.loads, log.splitlines()) if line["level"] != "INFO"], log
        status = (mounted / "analytics").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o2770, 10001, GROUP)


@as_root
@pytest.mark.no_coverage
@pytest.mark.parametrize(("mode", "group"), [(0o777, 0), (0o2777, GROUP)])
def test_an_open_volume_itself_is_refused_with_the_fix(place: Path, dsn: str, mode: int, group: int) -> None:
    with volume(place, mode, group) as mounted:
        loader = Container(("loader", "run"), 10001, GROUP, {}).start(SPOOL_DIR=str(mounted), LOADER_DSN=dsn)
        _, errors = loader.communicate(timeout=HANGS_AFTER)
        assert loader.returncode == 2 and errors.count("\n") == 1
        assert f"mkdir -p -m 2770 {mounted}/analytics" in errors and "fsGroup" in errors
        check = Container((sys.executable, "-m", "spool"), 10002, GROUP, {}).start(SPOOL_DIR=str(mounted))
        assert check.wait(HANGS_AFTER) == 0
