"""Development settings: a disabled emitter, printed lines, and a spool that cannot be created."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from spool import Emitter
from spool.testing import record
from tests.emit.lines import emit, lines
from tests.processes import environment

EVERYTHING = """
import asyncio, logging, os, sys
from spool import get_analytics_service, get_emitter
from spool.context import update
get_emitter().prepare()
assert get_emitter().emit_event(event_type="Not valid") is None
assert get_emitter().increment_counter(metric_name="a") is None
assert asyncio.run(get_analytics_service().record_gauge(metric_name="a", value=1)) is None
with get_emitter().timer("t"):
    update(user_id=3)
if (child := os.fork()) == 0:
    get_emitter().increment_counter(metric_name="a")
    os._exit(0)
os.waitpid(child, 0)
assert get_emitter().seal() and get_emitter().stats().emitted == 0 and not get_emitter().stats().dropped
"""


@pytest.mark.parametrize("strict", ["0", "1"])
def test_disabled_emits_logs_and_creates_nothing(tmp_path: Path, strict: str) -> None:
    variables = environment(SPOOL_DIR=str(tmp_path / "spool"), SPOOL_DISABLED="1", SPOOL_STRICT=strict)
    ended = subprocess.run([sys.executable, "-c", EVERYTHING], env=variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "spool").exists()


def test_a_test_records_what_a_disabled_emitter_is_asked_to_emit(tmp_path: Path) -> None:
    emitter = Emitter(
        tmp_path / "spool", disabled=True, before_emit=lambda event: event | {"metadata": {"b": 1}}
    )
    with record(emitter) as recorder:
        emit(emitter, a=1)
    assert [event["metadata"] for event in recorder.events] == [{"b": 1}]
    assert emit(emitter) is None and not (tmp_path / "spool").exists()


def test_the_console_shows_each_line_once_and_the_spool_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Emitter(tmp_path, console=True)) as emitter:
        for number in range(3):
            emit(emitter, number=number)
        emitter.increment_counter(metric_name="hits", labels={"a": "b"})
    *events, metric = capsys.readouterr().err.splitlines()
    assert [event.partition("{")[2] for event in events] == [f'"number":{number}}}' for number in range(3)]
    assert all(" user_id=" in event for event in events)
    assert metric.endswith(' hits counter 1 {"a":"b"}')
    assert len(lines(tmp_path)) == 4


def test_a_console_that_is_closed_costs_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with closing(Emitter(tmp_path, console=True)) as emitter:
        assert emit(emitter) is not None


def test_a_spool_that_cannot_be_created_is_one_message_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "from spool import get_emitter; get_emitter(); get_emitter().prepare()"
    variables = environment(SPOOL_DIR=str(tmp_path / "file/spool"))
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    (message,) = ended.stderr.splitlines()
    assert ended.returncode == 0 and "is not a directory; set SPOOL_DIR" in message
    ended = subprocess.run(
        [sys.executable, "-c", code], env=variables | {"SPOOL_STRICT": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "set SPOOL_DIR" in ended.stderr.splitlines()[-1]
