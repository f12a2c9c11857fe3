"""The emitter's promises, with real files, processes and signals."""

from __future__ import annotations

import asyncio
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orjson import Fragment

from spool import AnalyticsService, Emitter
from spool.context import bind
from spool.segment import SegmentName, recover
from tests.emit.lines import FAMILY, USER, emit, lines
from tests.processes import eventually


def test_an_emitted_event_is_one_line_with_the_keys_of_the_format(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    event_id = emit(emitter, title="Grüße", count=3)
    assert emitter.seal()
    (line,) = lines(tmp_path)
    assert list(line) == [
        "event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"
    ]  # fmt: skip
    assert line["event_id"] == event_id and uuid.UUID(event_id).version == 7
    assert line["metadata"] == {"title": "Grüße", "count": 3}
    age = time.time() - datetime.fromisoformat(line["timestamp"]).timestamp()
    assert 0 <= age < 60
    assert all(SegmentName.parse(file.stem) for file in tmp_path.iterdir() if file.suffix == ".ndjson")
    emitter.close()


def test_metrics_of_every_type_are_lines(tmp_path: Path) -> None:
    service = AnalyticsService(Emitter(tmp_path))

    async def record() -> None:
        await service.increment_counter(metric_name="api_request_count", labels={"endpoint": "/feed"})
        await service.record_gauge(metric_name="open_sessions", value=2.5)
        await service.record_timer(metric_name="feed_ms", duration_ms=12)
        await service.record_metric(metric_name="photo_bytes", metric_type="histogram", value=1 << 40)

    asyncio.run(record())
    service.emitter.close()
    found = [(line["metric_type"], line["value"]) for line in lines(tmp_path)]
    assert found == [("counter", 1), ("gauge", 2.5), ("timer", 12), ("histogram", 1 << 40)]


def test_an_idle_process_creates_no_files_and_a_closed_one_leaves_no_spare(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    assert not list(tmp_path.iterdir())
    emit(emitter)
    emitter.close()
    assert [file.suffix for file in tmp_path.iterdir()] == [".ndjson"]


def test_a_segment_is_sealed_by_age_without_a_further_emit(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=0.05)
    emit(emitter)
    eventually(lambda: lines(tmp_path))
    emitter.close()


def test_an_idle_process_holds_one_empty_segment_of_64_kib(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=0.05)
    for _ in range(3):
        emit(emitter)
        eventually(lambda: [file.stat().st_size for file in tmp_path.glob("*.open")] == [1 << 16])
    eventually(lambda: len(lines(tmp_path)) == 3)
    emitter.close()
    assert not list(tmp_path.glob("*.open"))


def test_segments_are_numbered_without_gaps_across_rotation(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, segment_bytes=4096)
    ids = [emit(emitter, text="x" * (i * 37 % 6000)) for i in range(500)]
    emitter.close()
    assert [line["event_id"] for line in lines(tmp_path)] == ids
    numbers = [int(file.stem.rsplit("-", 1)[1]) for file in sorted(tmp_path.glob("*.ndjson"))]
    assert numbers == list(range(1, len(numbers) + 1))
    assert emitter.stats().emitted == 500


def test_a_segment_of_a_running_writer_is_not_touched(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=60)
    emit(emitter)
    (file, *_) = sorted(tmp_path.glob("*.open"))
    assert recover(file) is None
    emitter.close()
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize(
    ("tail", "torn"),
    [(b"", 0), (b'{"cut', 5), (b'{"cut' + b"\0" * 99, 5), (b'\0\0\0cd"}\n', 5), (b"\0" * 70000, 0)],
)
def test_recovery_keeps_what_is_whole_and_counts_what_is_not(tmp_path: Path, tail: bytes, torn: int) -> None:
    file = tmp_path / "s.open"
    file.write_bytes(b'{"a":1}\n{"b":2}\n' + tail)
    sealed = recover(file)
    assert sealed is not None
    assert (sealed.lines, sealed.bytes, sealed.torn_bytes) == (2, 16, torn)
    assert (tmp_path / "s.ndjson").read_bytes() == b'{"a":1}\n{"b":2}\n'


RECURSIVE: dict[str, Any] = {}
RECURSIVE["self"] = RECURSIVE
ODD: dict[str, list[dict[Any, Any]]] = {
    "not_json": [RECURSIVE, {"a": Fragment(b"1,")}],
    "not_finite": [{"a": float("nan")}, {"a": [{"b": float("inf")}]}],
    "oversize": [{"a": "x" * (2 << 20)}],
}


@pytest.mark.parametrize(("cause", "metadata"), [(c, m) for c, values in ODD.items() for m in values])
def test_odd_metadata_is_dropped_and_counted_and_raises_only_when_strict(
    tmp_path: Path, cause: str, metadata: dict[Any, Any]
) -> None:
    emitter, strict = Emitter(tmp_path), Emitter(tmp_path, strict=True)
    event: dict[str, Any] = {
        "event_type": "odd",
        "user_id": USER,
        "family_unit_id": FAMILY,
        "metadata": metadata,
    }
    assert emitter.emit_event(**event) is None
    assert emitter.stats().dropped == {cause: 1}
    with pytest.raises(ValueError, match=r"."):
        strict.emit_event(**event)
    for each in (emitter, strict):
        each.close()


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("missing", {"user_id": None}),
        ("invalid_uuid", {"family_unit_id": "nobody"}),
        ("invalid_name", {"event_type": "Memory Posted"}),
        ("invalid_name", {"event_type": "x" * 101}),
        ("invalid_timestamp", {"timestamp": "2026-01-20T12:00:00"}),
    ],
)
def test_an_event_that_breaks_the_format_is_refused(
    tmp_path: Path, cause: str, change: dict[str, Any]
) -> None:
    emitter = Emitter(tmp_path)
    event: dict[str, Any] = {"event_type": "odd", "user_id": USER, "family_unit_id": FAMILY, **change}
    assert emitter.emit_event(**event) is None
    assert emitter.stats().dropped == {cause: 1}


@pytest.mark.parametrize("value", [float("nan"), -1, True, "1", None, 1 << 64])
def test_a_counter_value_that_is_no_count_is_refused(tmp_path: Path, value: Any) -> None:
    emitter = Emitter(tmp_path)
    assert emitter.increment_counter(metric_name="hits", value=value) is None
    assert emitter.stats().dropped.keys() <= {"invalid_value", "not_finite"}


def test_context_gives_what_the_call_does_not(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    with bind(user_id=USER, family_unit_id=FAMILY, role="parent", request_id="r1"):
        emitter.emit_event(event_type="feed_viewed", metadata={"role": "own"})
    emitter.close()
    (line,) = lines(tmp_path)
    assert line["user_id"] == str(USER)
    assert line["metadata"] == {"role": "own", "request_id": "r1"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abcdef"), inner),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from("abcdef"), json_values))
def test_metadata_is_kept_exactly(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("spool")
    emitter = Emitter(directory)
    assert emit(emitter, **metadata)
    emitter.close()
    (line,) = lines(directory)
    assert line["metadata"] == metadata


SENSITIVE = [
    "X-Api-Key",
    "user_password",
    "session token",
    "Authorization",
    "creditCardNumber",
    "ssn",
    "Cookie",
]


@given(
    st.recursive(
        st.sampled_from(SENSITIVE).map(lambda key: {key: "hunter2"})
        | st.sampled_from(SENSITIVE).map(lambda key: {key: {"inside": ["hunter2"]}}),
        lambda inner: inner.map(lambda v: {"a": v}) | inner.map(lambda v: {"b": [1, v], "c": None}),
    )
)
def test_secrets_at_any_depth_never_reach_the_spool(
    tmp_path_factory: pytest.TempPathFactory, planted: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    emitter = Emitter(directory)
    assert emit(emitter, **planted)
    assert emitter.increment_counter(metric_name="hits", labels=planted)
    emitter.close()  # first, because it renames files
    assert all(b"hunter2" not in file.read_bytes() for file in directory.iterdir())


@pytest.mark.parametrize(
    ("redact", "written"),
    [
        ("hobby", {"hobby": "[redacted]", "password": "[redacted]", "phone": "[redacted]"}),
        ("+hobby, school", {"hobby": "[redacted]", "password": "[redacted]", "phone": "[redacted]"}),
        ("-secrets", {"hobby": "x", "password": "x", "phone": "[redacted]"}),
        ("hobby,-personal_data", {"hobby": "[redacted]", "password": "[redacted]", "phone": "x"}),
        ("-secrets, -personal_data", {"hobby": "x", "password": "x", "phone": "x"}),
        (" ", {"hobby": "x", "password": "[redacted]", "phone": "[redacted]"}),
    ],
)
def test_a_set_is_switched_off_by_its_name_alone_and_words_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redact: str, written: dict[str, str]
) -> None:
    monkeypatch.setenv("SPOOL_REDACT", redact)
    emitter = Emitter(tmp_path)
    emit(emitter, hobby="x", password="x", phone="x")
    emitter.close()
    assert lines(tmp_path)[0]["metadata"] == written


def test_nul_characters_are_mended_because_postgres_cant_store_them(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    emit(emitter, text="a\0b", literal="\\u0000")
    emitter.close()
    assert lines(tmp_path)[0]["metadata"] == {"text": "a\ufffdb", "literal": "\\u0000"}
