"""For the tests of an application: what it emitted, without files.

    def test_posting_a_memory(client, recorder):
        client.post("/memories", ...)
        (event,) = recorder.of("memory_posted")
        assert event["metadata"]["media_count"] == 3

While it records, mistakes of the caller raise ValueError, as with `SPOOL_STRICT=1`.

pytest loads this module as a plugin. It has the fixture `recorder`, and keeps what tests emit without recording
it out of the real spool: SPOOL_DIR, whatever it was, is a temporary directory until the process ends. It is set
before the first conftest.py is read, which may set another one. `pytest -p no:spool.testing` leaves it alone.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from spool.emitter import Emitter, close_all, get_emitter


class Recorder:
    """What was emitted, in order, as it would have been written to the spool."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def write(self, line: bytes) -> int:
        """What the emitter calls instead of writing to a segment."""
        self._lines.append(line)
        return len(line)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every event and metric."""
        return [orjson.loads(line) for line in self._lines]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "event_type" in record]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "metric_name" in record]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The events or metrics of one name."""
        return [each for each in self.records if name in (each.get("event_type"), each.get("metric_name"))]

    def clear(self) -> None:
        self._lines.clear()


@contextmanager
def record(emitter: Emitter | None = None, *, strict: bool = True) -> Iterator[Recorder]:
    """Record what an emitter, the process-wide one unless given, is asked to emit until the block ends."""
    recorder = Recorder()
    with (emitter or get_emitter()).diverted(recorder.write, strict=strict):
        yield recorder


_temporary_spools: list[str] = []


def _use_temporary_spool() -> None:
    """Set SPOOL_DIR to a directory that is removed when this process ends."""
    if _temporary_spools:
        return
    directory = tempfile.mkdtemp(prefix="analytics-spool-")
    _temporary_spools.append(directory)
    os.environ["SPOOL_DIR"] = directory
    atexit.register(_remove, directory, os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() != owner:  # a child that a test forked
        return
    close_all()
    shutil.rmtree(directory, ignore_errors=True)


try:
    import pytest
except ImportError:  # an application may use `record` with another test runner
    pass
else:

    @pytest.fixture(name="recorder")
    def recorder() -> Iterator[Recorder]:
        """A `Recorder` of the process-wide emitter."""
        with record() as recording:
            yield recording

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests() -> None:
        """Keep tests out of the real spool before the application is imported."""
        _use_temporary_spool()

    def pytest_configure() -> None:
        """Do so for who loads this with `pytest_plugins` in a conftest.py."""
        _use_temporary_spool()
