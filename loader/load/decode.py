"""Decodes a line to a `Row` in COPY's text format, or to a `Reject` with the reason.

This module never uses a connection. An accepted line has the types, lengths and ranges of the line format
(spool/record.py); errors that only Postgres can detect (a number too long, a foreign key) are found by the
load. A row exported from one of the two tables (`row_to_json`) is also a valid line: its `id` and
`created_at` are ignored, but `id` is the event_id of a metric that has none. COPY text format:
https://www.postgresql.org/docs/current/sql-copy.html (tab between columns, `\\N` for NULL, backslash
escapes).
"""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import Final, NoReturn

import msgspec
import orjson
from msgspec import UNSET, UnsetType

from loader.files.mentions import is_erased
from loader.load.tables import EVENTS, METRICS, Table
from spool import ids
from spool.record import METRIC_TYPES, NAME, canonical_uuid, parse_timestamp, utc_text

ERASED: Final = "erased"
"""The code of a line that an erasure has overwritten: counted as erased, or rejected if the tables are older."""
MEMO_SIZE: Final = 65536
"""Number of validated ids and names at which their memo is cleared; about 10 MiB."""

_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_SEPARATORS: Final = "--T::."
"""The separators of a timestamp written by the emitter. `datetime.fromisoformat` checks the digits, but also
accepts weeks, commas and times without colons. Together, the two checks take a third of the time of a regular
expression (0.34 us less per line)."""
_BACKSLASH: Final = ord("\\")
_BRACE: Final = ord("{")
_NULL: Final = "\\N"
_AFTER_ID: Final = len('{"event_id":"0190163d-8694-739b-aea5-966c26f8ad91","')
_NUMBER: Final = re.compile(rb"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_BELOW_ZERO: Final = re.compile(rb"-[0.]*[1-9]")
_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


_ABSENT: Final = msgspec.Raw()
"""Falsy, like every empty Raw; msgspec does not support `Raw | None`."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """A loadable line. `copy` is its row in COPY's text format, without the newline.

    `hour` is the hour of its timestamp in UTC, such as `2026-11-25T03`, or the timestamp itself if it is not
    in the emitter's format.
    """

    event_id: str
    copy: str
    table: Table
    hour: str


class Reject(msgspec.Struct, frozen=True, gc=False):
    """A line that cannot be loaded, with a stable code and a human-readable reason."""

    code: str
    reason: str


class _Line(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    timestamp: str
    event_id: str | None = None
    id: msgspec.Raw = _ABSENT
    created_at: msgspec.Raw = _ABSENT
    event_type: str | None = None
    user_id: str | UnsetType | None = UNSET
    family_unit_id: str | UnsetType | None = UNSET
    session_id: str | None = None
    metadata: msgspec.Raw = _ABSENT
    metric_name: str | None = None
    metric_type: str | None = None
    value: msgspec.Raw = _ABSENT
    labels: msgspec.Raw = _ABSENT


_ID: Final = msgspec.json.Decoder(str | None).decode


class _Event(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An event in the emitter's format."""

    event_id: str
    event_type: str
    timestamp: str
    user_id: str | None
    family_unit_id: str | None
    session_id: str | None
    metadata: msgspec.Raw


_ids: set[str | None] = {None}
_names: set[str] = set()
"""Recently seen names, and (above) canonical ids of users, families and sessions, each of which may be null."""


class _RejectedError(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


_decode = msgspec.json.Decoder(_Line).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def decode(line: bytes) -> Row | Reject:
    """Return the row of one line (with or without its newline), or a reject. Never raises."""
    if line[_AFTER_ID : _AFTER_ID + 1] != b"m":  # the first letter of "metric_name" in the emitter's format
        try:
            if (row := _usual_event(_decode_event(line))) is not None:
                return row
        except (ValueError, RecursionError):
            pass  # the reason is determined below
    try:
        fields = _decode(line)
        return _event(fields) if fields.metric_name is None else _metric(fields)
    except _RejectedError as error:
        return Reject(error.code, str(error))
    except RecursionError:
        return Reject("too_deep", "nested too deeply")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return _explain(line, error)


def _usual_event(line: _Event) -> Row | None:
    """Return the row of an event in the usual form, or None. Takes half as long as `_event`."""
    event_id, timestamp, session_id = line.event_id, line.timestamp, line.session_id
    metadata = bytes(line.metadata)
    if (
        line.event_type in _names
        and line.user_id in _ids
        and line.family_unit_id in _ids
        and session_id in _ids
        and _UUID.fullmatch(event_id)
        and len(timestamp) == 27
        and timestamp[4:20:3] == _SEPARATORS
        and timestamp[26] == "Z"
        and _BACKSLASH not in metadata
        and metadata.isascii()
        and metadata[0] == _BRACE
        and (text := metadata.decode()).isprintable()
    ):
        datetime.fromisoformat(timestamp)  # raises for a date that does not exist
        row_id = event_id if event_id[14] == "7" else ids.uuid7(time.time_ns() // 1_000_000)
        return Row(
            event_id,
            f"{row_id}\t{event_id}\t{line.event_type}\t{timestamp}\t{line.user_id or _NULL}\t"
            f"{line.family_unit_id or _NULL}\t{session_id or _NULL}\t{text}",
            EVENTS,
            timestamp[:13],
        )
    return None


def _event(line: _Line) -> Row:
    if line.metric_type is not None or line.value or line.labels:
        _reject("unknown_field", "an event has no metric_type, value or labels")
    event_id = _uuid(line.event_id, "event_id")
    event_type = _name(line.event_type, "event_type")
    user_id = _optional_id(line.user_id, "user_id")
    family_unit_id = _optional_id(line.family_unit_id, "family_unit_id")
    session_id = _optional_id(line.session_id, "session_id")
    # A time-ordered primary key: the random default makes loading 20-50 % slower.
    row_id = event_id if event_id[14] == "7" else ids.uuid7(time.time_ns() // 1_000_000)
    timestamp = _timestamp(line.timestamp)
    return Row(
        event_id,
        f"{row_id}\t{event_id}\t{event_type}\t{timestamp}\t{user_id}\t{family_unit_id}\t"
        f"{session_id}\t{_object(line.metadata, 'metadata')}",
        EVENTS,
        _hour(timestamp),
    )


def _metric(line: _Line) -> Row:
    texts = (line.event_type, line.user_id, line.family_unit_id, line.session_id)
    if line.metadata or any(text is not None and text is not UNSET for text in texts):
        _reject(
            "unknown_field", "a metric has no event_type, user_id, family_unit_id, session_id or metadata"
        )
    event_id = _uuid(line.event_id, "event_id") if line.event_id is not None else _exported_id(line.id)
    name = _name(line.metric_name, "metric_name")
    if line.metric_type not in METRIC_TYPES:
        _reject("invalid_metric_type", f"metric_type is unknown: {str(line.metric_type)[:100]!r}")
    value = _value(line.value, line.metric_type)
    labels = _object(line.labels, "labels")
    timestamp = _timestamp(line.timestamp)
    return Row(
        event_id,
        f"{event_id}\t{name}\t{line.metric_type}\t{value}\t{labels}\t{timestamp}",
        METRICS,
        _hour(timestamp),
    )


def _reject(code: str, reason: str) -> NoReturn:
    raise _RejectedError(code, reason)


def _uuid(text: str | None, field: str) -> str:
    if text is None:
        _reject("missing_field", f"{field} is missing")
    if _UUID.fullmatch(text):
        return text
    canonical = canonical_uuid(text)
    if canonical is None:
        _reject("invalid_uuid", f"{field} is not a UUID: {text[:100]!r}")
    return canonical


def _exported_id(raw: msgspec.Raw) -> str:
    """Return the event_id of an exported metric: the table stores it as `id`."""
    try:
        return _uuid(_ID(raw) if raw else None, "event_id")
    except msgspec.ValidationError:
        _reject("invalid_uuid", f"id is not a UUID: {bytes(raw)[:100]!r}")


def _optional_id(text: str | UnsetType | None, field: str) -> str:
    """Return an id for COPY, or NULL. Only Postgres can decide whether the tables accept NULL."""
    if text is UNSET:
        _reject("missing_field", f"{field} is missing")
    return _NULL if text is None else _remembered(_uuid(text, field))


def _remembered(text: str) -> str:
    """Add a canonical id to the memo and return it. Any thread may call this: a lost write is harmless."""
    if len(_ids) >= MEMO_SIZE:
        _ids.clear()
        _ids.add(None)
    _ids.add(text)
    return text


def _name(text: str | None, field: str) -> str:
    if text is None:
        _reject("missing_field", f"{field} is missing")
    if text in _names:
        return text
    if not NAME.fullmatch(text):
        shown = f"{text[:100]!r} ({len(text)} characters)"
        _reject("invalid_name", f"{field} must be snake_case of 1 to 100 characters: {shown}")
    if len(_names) >= MEMO_SIZE:
        _names.clear()
    _names.add(text)
    return text


def _timestamp(text: str) -> str:
    try:
        moment = parse_timestamp(text)
        if moment.tzinfo is None:
            _reject("naive_timestamp", f"timestamp has no offset: {text[:100]!r}")
        return utc_text(moment)
    except ValueError:
        _reject("invalid_timestamp", f"timestamp is not RFC 3339: {text[:100]!r}")
    except OverflowError:
        _reject("invalid_timestamp", f"timestamp is not within the years 1 to 9999 of UTC: {text[:100]!r}")


def _hour(timestamp: str) -> str:
    return timestamp[:13] if timestamp[26:] == "Z" else timestamp


def _value(raw: msgspec.Raw, metric_type: str | None) -> str:
    if not raw:
        _reject("missing_field", "value is missing")
    data = bytes(raw)
    if not _NUMBER.fullmatch(data):
        _reject("invalid_value", f"value is not a number: {data[:100]!r}")
    if metric_type == "counter" and _BELOW_ZERO.match(data):
        _reject("invalid_value", f"a counter's value is below zero: {data[:100].decode()}")
    return data.decode()


def _object(raw: msgspec.Raw, field: str) -> str:
    if not raw:
        _reject("missing_field", f"{field} is missing")
    data = bytes(raw)
    if not data.startswith(b"{"):
        _reject("invalid_object", f"{field} is not an object")
    if _BACKSLASH in data or not data.isascii() or not (text := data.decode()).isprintable():
        return _unusual_object(data, field)
    return text


def _unusual_object(data: bytes, field: str) -> str:
    """Check an object with escapes, non-ASCII letters or spaces between tokens, and escape it for COPY."""
    if _ESCAPED_NUL.search(data):
        _reject("nul_character", f"{field} has the character \\u0000, which Postgres cannot store")
    try:
        orjson.loads(data)  # refuses what msgspec accepts: raw control characters and invalid UTF-8
    except orjson.JSONDecodeError as error:
        _reject("invalid_json", f"{field} is not JSON: {error}")
    # A raw tab or carriage return can only be between tokens here.
    text = data.decode().replace("\t", " ").replace("\r", " ").replace("\n", " ")
    return text.replace("\\", "\\\\")


def _explain(line: bytes, error: Exception) -> Reject:
    """Return a reject that explains why a line could not be decoded."""
    if not line.strip():
        return Reject("empty", "the line is empty")
    if is_erased(line):
        return Reject(ERASED, "the line was erased: its person or family was")
    if b"\0" in line:
        return Reject("nul_bytes", "the line has NUL bytes: it was cut by a crash or is not text")
    try:
        text = line.decode()
    except UnicodeDecodeError as not_utf8:
        return Reject("not_utf8", f"the line is not UTF-8 at byte {not_utf8.start}")
    constants: list[str] = []
    try:
        value = json.loads(text, parse_constant=constants.append)
    except (ValueError, RecursionError):
        return Reject("invalid_json", f"the line is not JSON: {error}")
    if constants:
        return Reject("not_finite", f"a number is not finite: {constants[0]}")
    if not isinstance(value, dict):
        return Reject("not_object", "the line is not a JSON object")
    message = str(error)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Reject("lone_surrogate", "a string has a lone surrogate")
    code = "missing_field" if "missing required" in message else "invalid_field"
    return Reject("unknown_field" if "unknown field" in message else code, message)
