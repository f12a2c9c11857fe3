"""The line contract: every line is a row or a reject with its own reason, and nothing raises."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.files import rejects
from loader.load.decode import Reject, Row, decode
from loader.load.tables import EVENTS
from spool import Emitter
from spool.testing import record
from tests.load.lines import EVENT, ID, METRIC


def columns(line: bytes) -> list[str]:
    row = decode(line)
    assert isinstance(row, Row), row
    return row.copy.split("\t")


def test_an_event_and_a_metric_become_their_columns() -> None:
    assert columns(orjson.dumps(EVENT)) == [
        ID, ID, "memory_posted", "2026-01-20T12:00:00.000001Z", ID, ID, "\\N", '{"a":1}'
    ]  # fmt: skip
    assert columns(orjson.dumps(METRIC)) == [ID, "hits", "counter", "1", "{}", "2026-01-20T11:00:00.000000Z"]


def test_any_uuid_loads_and_the_primary_key_is_a_uuid7() -> None:
    row_id, event_id, *_ = columns(orjson.dumps(EVENT | {"event_id": "C56A4180-65AA-42EC-A945-5FD21DEC0538"}))
    assert event_id == "c56a4180-65aa-42ec-a945-5fd21dec0538"
    assert row_id[14] == "7"


def test_backslashes_and_blanks_are_escaped_for_copy() -> None:
    line = orjson.dumps(EVENT | {"metadata": None}).replace(b"null}", b'{"a":\t"tab\\tquote\\" \\\\u0000"}}')
    assert columns(line)[-1] == r'{"a": "tab\\tquote\\" \\\\u0000"}'


@pytest.mark.parametrize(
    ("value", "below"),
    [
        ("-0", False), ("-0.0", False), ("-0e5", False), ("-0.000E-17", False), ("-1", True), ("-0.01", True),
        ("-0.0001e9", True), ("-10", True),
    ],
)  # fmt: skip
def test_a_counter_below_zero_is_refused_and_zero_may_have_a_sign(value: str, below: bool) -> None:
    line = orjson.dumps(METRIC).replace(b'"value":1', f'"value":{value}'.encode())
    assert isinstance(decode(line), Reject) is below


CANONICAL = "0190163d-8694-739b-aea5-966c26f8ad91"
UUIDS = {
    CANONICAL.upper(): CANONICAL,
    CANONICAL.replace("-", ""): CANONICAL,
    f"{{{CANONICAL}}}": CANONICAL,
    f"urn:uuid:{CANONICAL}": CANONICAL,
    f" {CANONICAL}": None,
    "0x90163d8694739baea5966c26f8ad91": None,
    CANONICAL.replace("-", "", 1): None,
    f"{{{{{CANONICAL}}}}}": None,
    f"{CANONICAL}\n": None,
    "\u0660" * 32: None,
}


@pytest.mark.parametrize(("text", "canonical"), UUIDS.items())
def test_emitter_and_loader_take_the_same_text_for_a_uuid(text: str, canonical: str | None) -> None:
    row = decode(orjson.dumps(EVENT | {"user_id": text}))
    assert (row.copy.split("\t")[4] if isinstance(row, Row) else None) == canonical
    assert emitted(user_id=text).get("user_id") == canonical


TIMESTAMPS = {
    "2026-01-20T12:00:00.123456Z": "2026-01-20T12:00:00.123456Z",
    "2026-01-20t12:00:00z": "2026-01-20T12:00:00.000000Z",
    "2026-01-20 12:00:00.1234567-23:59": "2026-01-21T11:59:00.123456Z",
    "1990-12-31T15:59:60-08:00": "1991-01-01T00:00:00.000000Z",
    "2016-12-31T23:59:60.500000Z": "2017-01-01T00:00:00.500000Z",
    "0001-01-01T00:00:00Z": "0001-01-01T00:00:00.000000Z",
    "9999-12-31T23:59:59.999999Z": "9999-12-31T23:59:59.999999Z",
    "2026-01-20T12:00:60Z": None,
    "9999-12-31T23:59:60Z": None,
    "9999-12-31T23:59:59-00:01": None,
    "0001-01-01T00:00:00+00:01": None,
    "0000-01-01T00:00:00Z": None,
    "10000-01-01T00:00:00Z": None,
    "2026-02-29T00:00:00.000000Z": None,
    "2026-01-20T24:00:00.000000Z": None,
    "2024-W01-1T12:30:00.123456Z": None,
    "2026-01-20T12:00:00,123456Z": None,
    "20260120T120000.1234567890Z": None,
    "2026-01-20T12:00Z": None,
    "2026-01-20T12:00:00+01": None,
    "2026-01-20T12:00:00": None,
    "2026-01-20T12:00:00.Z": None,
    "2026-01-20T12:00:00Z\n": None,
    "\u0662026-01-20T12:00:00.123456Z": None,
}


@pytest.mark.parametrize(("text", "utc"), TIMESTAMPS.items())
def test_emitter_and_loader_take_the_same_text_for_a_time(text: str, utc: str | None) -> None:
    decode(orjson.dumps(EVENT))  # known names and ids take a different path
    for known in (EVENT, EVENT | {"session_id": CANONICAL.upper()}):
        row = decode(orjson.dumps(known | {"timestamp": text}))
        assert (row.copy.split("\t")[3] if isinstance(row, Row) else None) == utc
    assert emitted(timestamp=text).get("timestamp") == utc


def emitted(**change: Any) -> dict[str, Any]:
    """Return the line that the emitter writes for an event, empty if it was refused."""
    event = {key: EVENT[key] for key in ("event_type", "user_id", "family_unit_id")}
    emitter = Emitter("/nowhere")
    with record(emitter, strict=False) as recorder:
        emitter.emit_event(**event | change)
    return (recorder.events or [{}])[0]


BROKEN = [
    ("naive_timestamp", {"timestamp": "2026-01-20T12:00:00"}),
    ("invalid_timestamp", {"timestamp": "2026-02-30T12:00:00Z"}),
    ("invalid_name", {"event_type": "x" * 200}),
    ("invalid_name", {"event_type": "Memory"}),
    ("invalid_uuid", {"family_unit_id": "me"}),
    ("nul_character", {"metadata": {"a": "\0"}}),
    ("invalid_object", {"metadata": [1]}),
    ("unknown_field", {"other": 1}),
    ("unknown_field", {"value": 1}),
    ("invalid_field", {"event_id": 7}),
]


@pytest.mark.parametrize(("code", "change"), BROKEN)
def test_a_broken_event_is_rejected_with_its_own_code(code: str, change: dict[str, Any]) -> None:
    reject = decode(orjson.dumps(EVENT | change))
    assert isinstance(reject, Reject)
    assert reject.code == code


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("not_finite", orjson.dumps(METRIC).replace(b'"value":1', b'"value":NaN')),
        ("invalid_value", orjson.dumps(METRIC | {"value": -1})),
        ("invalid_value", orjson.dumps(METRIC | {"value": "1"})),
        ("invalid_metric_type", orjson.dumps(METRIC | {"metric_type": "sum"})),
        ("lone_surrogate", orjson.dumps(EVENT).replace(b'{"a":1}', b'{"a":"\\ud800"}')),
        ("too_deep", orjson.dumps(EVENT).replace(b'{"a":1}', b'{"a":' + b"[" * 100_000)),
        ("not_utf8", b'{"event_id":"\xff"}'),
        ("nul_bytes", b'\0\0\0"}\n'),
        ("empty", b"\n"),
        ("not_object", b"[]"),
        ("invalid_json", b'{"event_id":'),
    ],
)
def test_a_broken_line_is_rejected_with_its_own_code(code: str, line: bytes) -> None:
    reject = decode(line)
    assert isinstance(reject, Reject)
    assert reject.code == code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
near_valid = st.builds(
    lambda base, change, dropped: {k: v for k, v in (base | change).items() if k not in dropped},
    st.sampled_from([EVENT, METRIC]),
    st.dictionaries(st.sampled_from([*EVENT, *METRIC, "other"]), json_values, max_size=2),
    st.sets(st.sampled_from([*EVENT, *METRIC]), max_size=1),
)


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("text", ['"\\ud800"', '"\\udc00x"', '"\\ud800\\u0041"'])
def test_half_a_surrogate_pair_is_named_as_such(text: str) -> None:
    reject = decode(orjson.dumps(EVENT).replace(b'{"a":1}', b'{"a":' + text.encode() + b"}"))
    assert isinstance(reject, Reject)
    assert reject.code == "lone_surrogate"


@given(st.binary() | json_values.map(_dumps) | near_valid.map(_dumps))
def test_every_line_is_a_row_or_a_reject_that_keeps_it(line: bytes) -> None:
    line = line.replace(b"\n", b"")
    found = decode(line)
    if isinstance(found, Row):
        assert "\n" not in found.copy and found.copy.count("\t") == (7 if found.table is EVENTS else 5)
        return
    rejected = rejects.Rejected("s.ndjson", 3, found.code, found.reason, line)
    assert rejects.decode(rejected.encode()) == rejected


def test_an_id_that_was_seen_is_no_name_and_a_name_is_no_id() -> None:
    assert isinstance(decode(orjson.dumps(EVENT)), Row)
    for change in ({"event_type": ID}, {"user_id": "memory_posted"}, {"family_unit_id": "memory_posted"}):
        assert isinstance(decode(orjson.dumps(EVENT | change)), Reject)
