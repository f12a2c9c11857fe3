"""`python -m spool` finds problems that would lose events, and leaves no files behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spool import check
from tests.processes import environment


def checked(**variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spool"]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_usable_spool_is_ok_and_stays_as_it_was(tmp_path: Path, there: bool) -> None:
    spool = tmp_path if there else tmp_path / "a/spool"
    ended = checked(SPOOL_DIR=str(spool), SPOOL_RELEASE="1.2")
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout
    assert "release 1.2" in ended.stdout and "ok       test event  emitted" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_spool_that_cannot_be_written_fails_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = checked(SPOOL_DIR=str(tmp_path / "file/spool"), SPOOL_STRICT="1")
    assert ended.returncode == 1 and "set SPOOL_DIR" in ended.stdout and ended.stderr == ""


def test_an_invalid_setting_fails_and_is_named(tmp_path: Path) -> None:
    ended = checked(SPOOL_DIR=str(tmp_path), SPOOL_MAX_AGE="soon")
    assert ended.returncode == 1 and "failed   settings    SPOOL_MAX_AGE must be" in ended.stdout


def test_in_uwsgi_its_options_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOOL_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "uwsgi", SimpleNamespace(opt={b"master": True}))
    found = [finding for finding in check.findings() if finding.check == "uwsgi"]
    assert len(found) == 2 and {finding.verdict for finding in found} == {"warning"}
