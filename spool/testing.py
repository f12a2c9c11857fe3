"""Records what an application emits in its tests, without files.

    def test_posting_a_memory(client, recorder):
        client.post("/memories", ...)
        (event,) = recorder.of("memory_posted")
        assert event["metadata"]["media_count"] == 3

While recording, invalid calls raise ValueError, as with `SPOOL_STRICT=1`.

pytest loads this module as a plugin. It provides the fixture `recorder`, and keeps unrecorded emits of tests
out of the real spool: SPOOL_DIR is replaced by a temporary directory until the process exits. This happens
before the first conftest.py is read, which may set another directory. `pytest -p no:spool.testing` disables
the plugin.
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
    """The emitted lines, in order, as they would have been written to the spool."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []

    def write(self, line: bytes) -> int:
        """Record a line. The emitter calls this instead of writing to a segment."""
        self._lines.append(line)
        return len(line)

    @property
    def records(self) -> list[dict[str, Any]]:
        """All events and metrics."""
        return [orjson.loads(line) for line in self._lines]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "event_type" in record]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [record for record in self.records if "metric_name" in record]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Return the events or metrics of one name."""
        return [each for each in self.records if name in (each.get("event_type"), each.get("metric_name"))]

    def clear(self) -> None:
        self._lines.clear()


@contextmanager
def record(emitter: Emitter | None = None, *, strict: bool = True) -> Iterator[Recorder]:
    """Record what an emitter, by default the process-wide one, emits until the block ends."""
    recorder = Recorder()
    with (emitter or get_emitter()).diverted(recorder.write, strict=strict):
        yield recorder


_temporary_spools: list[str] = []


def _use_temporary_spool() -> None:
    """Set SPOOL_DIR to a directory that is removed when this process exits."""
    if _temporary_spools:
        return
    directory = tempfile.mkdtemp(prefix="analytics-spool-")
    _temporary_spools.append(directory)
    os.environ["SPOOL_DIR"] = directory
    atexit.register(_remove, directory, os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() != owner:  # a child forked by a test
        return
    close_all()
    shutil.rmtree(directory, ignore_errors=True)


try:
    import pytest
except ImportError:  # an application may use `record` with a different test runner
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
        """Do the same if this module is loaded by `pytest_plugins` in a conftest.py."""
        _use_temporary_spool()
