"""Fixtures: a new emitter for each test, and its emitted lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spool import Emitter
from spool.testing import Recorder, record


@pytest.fixture
def emitter(tmp_path: Path) -> Emitter:
    return Emitter(tmp_path / "spool")


@pytest.fixture
def recorded(emitter: Emitter) -> Iterator[Recorder]:
    with record(emitter) as recorder:
        yield recorder
