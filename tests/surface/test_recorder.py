"""What a test records is recorded, and nothing of it reaches the spool, whatever the application calls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from spool import AnalyticsService, Emitter
from spool.testing import record

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
