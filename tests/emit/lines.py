"""An emit with default arguments, and the lines of a spool."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from spool import Emitter
from spool.metrics import DROPPED_METRIC
from spool.segment import recover

USER, FAMILY = uuid.uuid4(), uuid.uuid4()


def emit(emitter: Emitter, **metadata: Any) -> str | None:
    return emitter.emit_event(
        event_type="memory_posted", user_id=USER, family_unit_id=FAMILY, metadata=metadata
    )


@contextmanager
def interrupted(emitter: Emitter, seconds: float = 0.0005, **metadata: Any) -> Iterator[list[str | None]]:
    """Emit from a signal handler at an interval; yield the ids of these emits."""
    kept: list[str | None] = []

    def handler(*_: object) -> None:
        kept.append(emit(emitter, **metadata))
        signal.setitimer(signal.ITIMER_REAL, seconds)  # armed last, so that handlers never pile up

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield kept
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def lines(directory: Path, pattern: str = "*.ndjson") -> list[dict[str, Any]]:
    return [orjson.loads(line) for file in sorted(directory.glob(pattern)) for line in file.open("rb")]


def ids(directory: Path) -> list[str]:
    return [line["event_id"] for line in lines(directory) if line.get("metric_name") != DROPPED_METRIC]


def recover_all(directory: Path) -> None:
    """Seal the segments of dead writers, as the loader does."""
    for file in directory.glob("*.open"):
        recover(file)
    assert not list(directory.glob("*.open"))
