"""The installation in loader/README.md, followed literally on a fresh Debian that has been booted.

Without a network the machine installs the wheels that pip has brought to the host. All else is the document's: its
blocks run as they are, with the wheel in the place of the checkout.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import LOADER
from tests.operate.boot.machine import Machine, booted, make_root, obstacle
from tests.release import PIP

UNIT = "analytics-loader"
DSN = f"/etc/{UNIT}/dsn"
PEER = "postgresql:///family"
BY_PASSWORD = "postgresql://by_password:{}@127.0.0.1/family"
EMIT = """
import sys
from uuid import UUID, uuid4
from spool import get_emitter
user = UUID(int=7)
kept = [get_emitter().emit_event(event_type=sys.argv[1], user_id=user, family_unit_id=user) for _ in range(100)]
assert all(kept)
"""
NEWER = "9.9.9"
WATCHDOG = f"/run/systemd/system/{UNIT}.service.d/watchdog.conf"

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "none")]


def blocks() -> dict[str, str]:
    """Return the commands of the document, by what they are for."""
    names = ("install", "start", "application", "instance", "upgrade")
    return dict(zip(names, LOADER.snippets("bash"), strict=True))


def of_wheel(commands: str, name: str) -> str:
    """Return the commands with a wheel in the place of the checkout."""
    assert "'.[loader]'" in commands
    return commands.replace("'.[loader]'", f"'/shared/{name}[loader]'")


def renamed(wheel: Path, directory: Path) -> Path:
    """Write the wheel as one of a later version."""
    package, version = wheel.name.split("-")[:2]
    old, new = f"{package}-{version}", f"{package}-{NEWER}"
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(directory / wheel.name.replace(old, new), "w") as made,
    ):
        for name in source.namelist():
            data = source.read(name)
            if name.endswith((".dist-info/METADATA", ".dist-info/RECORD")):
                data = data.replace(old.encode(), new.encode())
                data = data.replace(f"\nVersion: {version}\n".encode(), f"\nVersion: {NEWER}\n".encode())
            made.writestr(name.replace(old, new), data)
        return Path(str(made.filename))


@pytest.fixture(scope="module")
def packages(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel, one of a later version, and what they require on the machine."""
    directory = tmp_path_factory.mktemp("packages")
    shutil.copy(wheel, directory)
    for_debian = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
    download: list[str | Path] = [*PIP, "download", "--dest", directory, *for_debian, f"{wheel}[loader]"]
    subprocess.run(download, check=True)
    renamed(wheel, directory)
    return directory


@pytest.fixture(scope="module")
def machine(packages: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the document was followed, by a root who makes private files."""
    root = tmp_path_factory.mktemp("debian") / "root"
    root.mkdir(mode=0o755)
    try:
        make_root(root)
        (root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /shared\n")
        (root / "srv/emit.py").write_text(EMIT)
        with booted(root, packages) as machine:
            machine("runuser -u postgres -- createdb family")
            # One shell, because the second block uses the working directory of the first.
            steps = of_wheel(blocks()["install"], wheel.name) + blocks()["start"] + blocks()["application"]
            machine(f"umask 077; cd /root; set -eu\n{steps}")
            yield machine
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", root], check=True)


@pytest.fixture
def service(machine: Machine) -> Machine:
    """The machine, with a service that runs as it was installed."""
    machine(f"echo {PEER} > {DSN}; rm -f {WATCHDOG}; systemctl daemon-reload; systemctl restart {UNIT}")
    return machine


def emit(machine: Machine, name: str, directory: str = "") -> None:
    """Emit 100 events in a process of the application's user."""
    variables = f"SPOOL_DIR={directory}" if directory else ""
    machine(f"runuser -u www-data -- env {variables} /opt/analytics-spool/bin/python /srv/emit.py {name}")


def loads(machine: Machine, name: str, count: int = 100) -> None:
    """Wait until so many events of a type are rows."""
    statement = f"SELECT count(*), count(DISTINCT event_id) FROM analytics_events WHERE event_type = '{name}'"
    machine.eventually(f'runuser -u postgres -- psql -d family -Atc "{statement}" 2>&1', f"{count}|{count}")


def main_pid(machine: Machine, unit: str = UNIT) -> int:
    return int(machine(f"systemctl show --value -p MainPID {unit}"))


def journal(machine: Machine, since: str) -> str:
    """Return the log lines of the service since a cursor of the journal."""
    return machine(f"journalctl -u {UNIT} -o cat --no-pager --after-cursor='{since}'")


def cursor(machine: Machine) -> str:
    """The present end of the journal."""
    machine("journalctl --sync")
    return machine("journalctl -n 0 --show-cursor").partition("-- cursor: ")[2].strip()


def test_what_the_application_emits_is_loaded(service: Machine) -> None:
    emit(service, "first")
    loads(service, "first")
    # The loader, a user of its own, also settles what the application's user has stated.
    service.eventually("find /var/spool/analytics -type f ! -name .loader.lock", "")
    assert "Permission denied" not in service(f"journalctl -b -u {UNIT} -o cat --no-pager")


def test_loader_is_found_and_reports_that_all_is_well(service: Machine) -> None:
    report = service(f"cd /root && runuser -u analytics -- loader doctor --dsn {PEER}")
    assert not re.search("^(failed|warning)", report, re.MULTILINE), report
    assert "lag" in service(f"runuser -u analytics -- loader status --dsn {PEER}")


def test_a_loader_that_is_killed_starts_again(service: Machine) -> None:
    before = main_pid(service)
    service(f"systemctl kill --signal=KILL {UNIT}")
    emit(service, "killed")
    loads(service, "killed")
    assert main_pid(service) not in (0, before)


def test_a_reload_connects_again_and_keeps_the_process(service: Machine) -> None:
    before, since = main_pid(service), cursor(service)
    service(f"systemctl reload {UNIT}")
    emit(service, "reloaded")
    loads(service, "reloaded")
    assert main_pid(service) == before
    assert "reconnecting" in journal(service, since)


def test_a_loader_that_hangs_is_replaced_by_the_watchdog(service: Machine) -> None:
    service(f"mkdir -p $(dirname {WATCHDOG}); printf '[Service]\\nWatchdogSec=5\\n' > {WATCHDOG}")
    service(f"systemctl daemon-reload; systemctl restart {UNIT}")
    since = cursor(service)
    service(f"kill -STOP {main_pid(service)}")
    emit(service, "hung")
    loads(service, "hung")
    assert "Failed with result 'watchdog'" in journal(service, since)


def test_a_wrong_password_is_reported_as_such_and_its_correction_loads_what_waits(service: Machine) -> None:
    sql = "CREATE ROLE by_password LOGIN PASSWORD 'right' IN ROLE analytics"
    service(f'runuser -u postgres -- psql -d family -qc "{sql}"')
    since = cursor(service)
    service(f"echo {BY_PASSWORD.format('wrong')} > {DSN}; systemctl restart {UNIT}")
    emit(service, "waiting")
    service.eventually(
        f"systemctl show -P StatusText {UNIT} | grep -o 'password authentication failed' | uniq",
        "password authentication failed",
    )
    logged = journal(service, since)
    assert "password authentication failed" in logged and "wrong@" not in logged
    service(f"echo {BY_PASSWORD.format('right')} > {DSN}; systemctl restart {UNIT}")
    loads(service, "waiting")
    assert "ok       connection" in service(f"LOADER_DSN_FILE={DSN} loader doctor", code=None)


def test_a_service_without_a_database_stops_and_names_the_setting(service: Machine) -> None:
    since = cursor(service)
    service(f": > {DSN}; systemctl restart {UNIT}", code=1)
    assert service(f"systemctl show -P ExecMainStatus -P ActiveState {UNIT}").split() == ["2", "failed"]
    assert "no database is set" in journal(service, since)


def test_settings_of_the_environment_file_work_within_the_sandbox(service: Machine) -> None:
    example = f"/etc/{UNIT}/environment"
    service(f"cp {example} /root/kept; sed -i 's/^#LOADER/LOADER/' {example}; systemctl restart {UNIT}")
    emit(service, "archived")
    loads(service, "archived")
    service.eventually("find /var/lib/analytics-archive -name '*.zst' -print -quit | grep -c .", "1")
    page = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9187/metrics').read().decode())"
    assert "analytics_loader_up 1.0" in service(f'python3 -c "{page}"')
    service(f"cp /root/kept {example}")


def test_an_instance_makes_and_loads_a_spool_of_its_own(service: Machine) -> None:
    service(f"set -eu\n{blocks()['instance']}")
    assert service("stat -c '%U:%G %a' /var/spool/analytics-photos").strip() == "analytics:analytics 2770"
    emit(service, "photos", "/var/spool/analytics-photos")
    loads(service, "photos")
    assert main_pid(service, f"{UNIT}@photos") != main_pid(service)
    service(f"systemctl disable --now {UNIT}@photos; rm -r /var/spool/analytics-photos")


def test_after_a_reboot_it_starts_by_itself_and_nothing_is_lost(service: Machine) -> None:
    service(f"systemctl stop {UNIT}")
    emit(service, "before")
    assert service("find /var/spool/analytics -maxdepth 1 -name '*-*.*'")
    service.reboot()
    service.eventually(f"systemctl is-active {UNIT}", "active")
    loads(service, "before")
    emit(service, "after")
    loads(service, "after")


def test_an_upgrade_loads_with_the_later_version(service: Machine, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    assert version in service("loader --version")
    before = main_pid(service)
    emit(service, "upgraded")
    steps = of_wheel(blocks()["upgrade"], wheel.name.replace(version, NEWER))
    service(f"umask 077; cd /root; set -eu\n{steps}")
    assert NEWER in service("loader --version")
    emit(service, "upgraded")
    loads(service, "upgraded", 200)
    assert main_pid(service) not in (0, before)
