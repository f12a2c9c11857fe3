"""A test records everything that the application emits, and nothing reaches the spool."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spool import AnalyticsService, Emitter
from spool.testing import record
from tests.processes import environment

MOMENT = datetime(2026, 1, 20, 12, tzinfo=UTC)


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    with closing(Emitter(tmp_path / "spool")) as made:
        yield made


@pytest.mark.parametrize("call", ["seal", "close", "prepare"])
def test_a_recorder_survives_what_ends_a_segment(emitter: Emitter, tmp_path: Path, call: str) -> None:
    with record(emitter) as recorder:
        for _ in range(3):
            emitter.increment_counter(metric_name="hits")
            getattr(emitter, call)()
        assert len(recorder.of("hits")) == 3
    assert emitter.stats().emitted == 0


def test_a_recorder_survives_one_in_it(emitter: Emitter, tmp_path: Path) -> None:
    with record(emitter) as outer:
        with record(emitter, strict=False) as inner:
            emitter.increment_counter(metric_name="in")
        emitter.increment_counter(metric_name="out")
        with pytest.raises(ValueError, match="metric_name"):
            emitter.increment_counter(metric_name="Not valid")
    assert (len(inner.records), len(outer.records)) == (1, 1)
    assert not (tmp_path / "spool").exists()


def test_a_child_of_a_test_that_records_writes_nothing(emitter: Emitter, tmp_path: Path) -> None:
    with record(emitter):
        if (child := os.fork()) == 0:
            emitter.increment_counter(metric_name="hits")
            emitter.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert not (tmp_path / "spool").exists()


def test_every_metric_may_have_a_timestamp(emitter: Emitter) -> None:
    service = AnalyticsService(emitter)
    with record(emitter) as recorder:
        emitter.increment_counter(metric_name="a", timestamp=MOMENT)
        emitter.record_gauge(metric_name="b", value=1, timestamp="2026-01-20T12:00:00Z")
        emitter.record_timer(metric_name="c", duration_ms=1, timestamp=MOMENT)
        emitter.record_metric(metric_name="d", metric_type="histogram", value=1, timestamp=MOMENT)

        async def awaited() -> None:
            await service.increment_counter(metric_name="e", timestamp=MOMENT)
            await service.record_gauge(metric_name="f", value=1, timestamp=MOMENT)
            await service.record_timer(metric_name="g", duration_ms=1, timestamp=MOMENT)
            await service.record_metric(metric_name="h", metric_type="gauge", value=1, timestamp=MOMENT)

        asyncio.run(awaited())
        with pytest.raises(ValueError, match="timestamp"):
            emitter.increment_counter(metric_name="a", timestamp="yesterday")
    assert len(recorder.metrics) == 8
    assert {metric["timestamp"] for metric in recorder.metrics} == {"2026-01-20T12:00:00.000000Z"}


PROJECT = {
    "application.py": """
from spool import get_emitter
emitter = get_emitter()
emitter.prepare()
def hit():
    emitter.increment_counter(metric_name="hits")
""",
    "conftest.py": "import application",
    "test_application.py": """
import atexit, os, subprocess, sys
from application import emitter, hit
from pathlib import Path

def test_that_records_nothing():
    hit()
    assert emitter.stats().emitted == 1
    subprocess.run([sys.executable, "-c", "import application; application.hit()"], check=True)
    if (child := os.fork()) == 0:
        atexit._run_exitfuncs()  # what removes the spool of its parent at its end
        os._exit(0)
    os.waitpid(child, 0)
    print("spool", emitter.settings.directory)
    assert list(emitter.settings.directory.glob("*.ndjson"))

def test_that_records(recorder):
    hit()
    assert len(recorder.of("hits")) == 1
""",
}


@pytest.mark.no_coverage
def test_no_test_writes_to_the_real_spool_by_accident(tmp_path: Path) -> None:
    project, real = tmp_path / "project", tmp_path / "real"
    project.mkdir()
    for name, text in PROJECT.items():
        (project / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "spool.testing", "-p", "no:cacheprovider"]
    variables = environment(SPOOL_DIR=str(real), PYTHONPATH=os.pathsep.join([str(project), *sys.path]))
    ended = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0 and "2 passed" in ended.stdout, ended.stdout
    assert not real.exists()
    (used,) = re.findall("^spool (.+)$", ended.stdout, re.MULTILINE)
    assert not Path(used).exists()
