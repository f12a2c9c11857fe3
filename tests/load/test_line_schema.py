"""The JSON Schema of a line and the loader agree: valid lines are loaded, invalid lines are rejected.

The loader accepts more than the schema, such as a UUID in braces; test_decode.py has those lines.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.load.decode import Row, decode
from spool import Emitter
from tests.emit.lines import lines
from tests.load.lines import EVENT, ID, METRIC
from tests.processes import LOADER, environment


def schema() -> Any:
    printed = subprocess.check_output([*LOADER, "schema", "--json"], env=environment())
    return json.loads(printed)


SCHEMA = schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_line_of_an_emitter_is_valid(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, identity="optional")
    user = uuid4()
    emitter.emit_event(event_type="photo_liked", user_id=user, family_unit_id=user, session_id=user)
    emitter.emit_event(event_type="job_done", metadata={"a": [1, {"b": None}], "ü": "\n", "n": 1e300})
    emitter.emit_event(event_type="nobody", user_id="wrong")
    emitter.increment_counter(metric_name="hits", labels={"endpoint": "/x"})
    emitter.record_gauge(metric_name="level", value=-2.5)
    emitter.record_timer(metric_name="work_ms", duration_ms=1)
    emitter.close()
    written = lines(tmp_path)
    assert len(written) == 6, "with the metric of the drop"
    for line in written:
        VALIDATOR.validate(line)


def without(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != name}


def with_each(line: dict[str, Any], name: str, *wrong: Any) -> list[Any]:
    return [line | {name: value} for value in wrong]


BAD: list[Any] = [
    *(without(EVENT, name) for name in EVENT if name != "session_id"),
    *(without(METRIC, name) for name in METRIC),
    *with_each(EVENT, "event_id", None, 7, "", "x" * 36, "0190163d-8694-739b-aea5-966c26f8ad9", ID + "\n"),
    *with_each(EVENT, "user_id", "", 1, "x"), *with_each(EVENT, "family_unit_id", "", 1, "x"),
    *with_each(EVENT, "session_id", "", 1, "x"),
    *with_each(EVENT, "event_type", None, "", "Photo", "photo-liked", "1st", "a" * 101, "é", "a\n"),
    *with_each(METRIC, "metric_name", None, "", "Hits", "hits/s", "a" * 101),
    *with_each(EVENT, "timestamp", None, 0, "", "2026-01-20", "2026-01-20T12:00:00", "12:00:00Z", "2026-01-20T12:00:00Z\n"),
    *with_each(EVENT, "metadata", None, [], "{}", 1, {"a": "\0"}, {"\0": 1}, {"a": [{"b": "x\0"}]}),
    *with_each(METRIC, "labels", None, [], "{}"),
    *with_each(METRIC, "value", None, "1", True, [], -1, -0.5),
    *with_each(METRIC, "metric_type", None, "", "Counter", "summary", 1),
    EVENT | {"value": 1}, METRIC | {"user_id": EVENT["user_id"]}, EVENT | {"extra": 1}, EVENT | METRIC, {}, [], 1, "x",
    None,
]  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=lambda line: json.dumps(line)[:120])
def test_what_the_schema_forbids_is_a_reject(line: Any) -> None:
    assert not VALIDATOR.is_valid(line)
    assert not isinstance(decode(json.dumps(line).encode()), Row)


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=4)
UUID = st.uuids().map(str) | st.uuids().map(lambda each: str(each).upper())
MOMENT = st.from_regex(
    r"\A20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,9})?"
    r"(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])\Z"
)
NAME = st.from_regex(r"\A[a-z][a-z0-9_]{0,99}\Z")
EVENTS = st.fixed_dictionaries(
    {
        "event_id": UUID, "event_type": NAME, "timestamp": MOMENT, "user_id": UUID | st.none(),
        "family_unit_id": UUID | st.none(), "metadata": OBJECT,
    },
    optional={"session_id": UUID | st.none()},
)  # fmt: skip
METRICS = st.fixed_dictionaries({
    "event_id": UUID, "metric_name": NAME, "metric_type": st.sampled_from(["counter", "gauge", "timer", "histogram"]),
    "value": st.integers(0, 10**30) | st.floats(0, allow_nan=False, allow_infinity=False), "labels": OBJECT,
    "timestamp": MOMENT,
})  # fmt: skip


@given(EVENTS | METRICS)
def test_what_is_valid_loads(line: Any) -> None:
    VALIDATOR.validate(line)
    row = decode(json.dumps(line, ensure_ascii=False).encode())
    assert isinstance(row, Row), row
