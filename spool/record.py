"""A line of the spool: one event or one metric as JSON, and the limits it must keep.

This room never opens a file. It turns values that were given by an application into the bytes of one
line, or refuses them with a reason; the loader reads the same limits from here.

    {"event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"}
    {"event_id", "metric_name", "metric_type", "value", "labels", "timestamp"}

What always holds of an encoded line: it is UTF-8, ends with the only newline in it, has no NUL byte and no
escaped NUL, no lone surrogate and no number that is not finite, so Postgres can store it
(https://www.postgresql.org/docs/current/datatype-json.html).

Everything here is a pure function but for bounded memos of texts that were checked before (`_KNOWN_*`);
they may be read and written from any thread, because a lost write only costs checking once more.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import orjson

from spool.redaction import Redaction

EVENT_KEYS: Final = (
    "event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata",
)  # fmt: skip
METRIC_KEYS: Final = ("event_id", "metric_name", "metric_type", "value", "labels", "timestamp")
METRIC_TYPES: Final = frozenset({"counter", "gauge", "timer", "histogram"})
NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,99}", re.ASCII)
"""snake_case, 1 to 100 characters: the width of `event_type` and `metric_name` in schema.sql."""

MEMO_SIZE: Final = 8192
"""Entries after which a memo starts anew; some 1 MiB, more users than are active within one second."""

_JSON_OPTIONS: Final = orjson.OPT_UTC_Z
_PLAIN_TYPES: Final = frozenset({str, int, bool})
_BACKSLASH: Final = ord("\\")

_KNOWN_UUIDS: dict[object, str] = {}
_KNOWN_NAMES: set[str] = set()


class Refused(ValueError):
    """What was given can't become a line. `cause` is the word it is counted under."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def uuid_text(value: object, field: str) -> str:
    """Return the canonical text of a UUID given as `uuid.UUID` or text.

    >>> uuid_text("0190163D-8694-739B-AEA5-966C26F8AD91", "user_id")
    '0190163d-8694-739b-aea5-966c26f8ad91'

    Raises `Refused` (cause `invalid_uuid`, or `missing` for None). The hot path asks `known_uuid` first.
    """
    if value is None:
        raise Refused("missing", f"{field} is missing: give it to the call or bind it to the context")
    try:
        text = str(value if isinstance(value, UUID) else UUID(str(value)))
    except ValueError:
        raise Refused("invalid_uuid", f"{field} is not a UUID: {str(value)[:100]!r}") from None
    if len(_KNOWN_UUIDS) >= MEMO_SIZE:
        _KNOWN_UUIDS.clear()
    # A UUID is keyed by its number: hashing the object runs Python code, hashing an int does not.
    _KNOWN_UUIDS[value.int if type(value) is UUID else str(value)] = text
    return text


known_uuid: Final[Callable[[object], str | None]] = _KNOWN_UUIDS.get
"""Text of a UUID seen lately, by its `int` or by the text it was given as; None where it was not seen."""


def check_name(name: object, field: str) -> None:
    """Raise `Refused` (cause `invalid_name`) unless `name` is snake_case of 1 to 100 characters."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = str(name)[:120]
        raise Refused("invalid_name", f"{field} must be snake_case of 1 to 100 characters: {shown!r}")
    if len(_KNOWN_NAMES) >= MEMO_SIZE:
        _KNOWN_NAMES.clear()
    _KNOWN_NAMES.add(name)


known_names: Final = _KNOWN_NAMES
"""Names that were checked lately."""


def timestamp_text(value: object) -> str:
    """Return RFC 3339 text of a time the caller gives: an aware `datetime`, or text of one.

    Raises `Refused` (cause `invalid_timestamp`) where it has no offset or is no time.
    """
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        raise Refused("invalid_timestamp", f"timestamp is not RFC 3339: {str(value)[:100]!r}") from None
    if moment.utcoffset() is None:
        raise Refused("invalid_timestamp", f"timestamp has no offset: {str(value)[:100]!r}; add tzinfo")
    try:
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except OverflowError:
        raise Refused("invalid_timestamp", f"timestamp is out of range: {str(value)[:100]!r}") from None


def encode_object(value: Mapping[str, Any] | None, field: str, redaction: Redaction) -> bytes:
    """Return `metadata` or `labels` as a JSON object without secrets, ready to be put into a line.

    A flat object of strings and integers under harmless keys costs one `orjson.dumps` and three look-ups;
    anything else is looked at value by value (`_mend`).

    Raises `Refused`: `not_json` (a type JSON has not, a key that is not a string, a lone surrogate, an
    integer beyond 64 bits, a recursive or too deeply nested value), `not_finite` (NaN or infinity).
    """
    if not value:
        if value is None or isinstance(value, Mapping):
            return b"{}"
        raise Refused("not_json", f"{field} must be an object, not {type(value).__name__}")
    if type(value) is not dict:
        if not isinstance(value, Mapping):
            raise Refused("not_json", f"{field} must be an object, not {type(value).__name__}")
        value = dict(value)
    try:
        data = orjson.dumps(value, None, _JSON_OPTIONS)
    except TypeError as error:  # orjson.JSONEncodeError is a TypeError
        raise Refused("not_json", f"{field} can't be written as JSON: {error}") from None
    if (
        _PLAIN_TYPES.issuperset(map(type, value.values()))
        and redaction.harmless(value)
        and _BACKSLASH not in data
    ):
        return data
    return _mend(value, data, field, redaction)


def _mend(value: Mapping[str, Any], data: bytes, field: str, redaction: Redaction) -> bytes:
    """The same object with secrets redacted and NUL characters replaced; refuses what is not finite."""
    if b"null" in data and not _all_finite(value):
        raise Refused("not_finite", f"{field} has a number that is not finite")
    decoded = orjson.loads(data)
    mended = redaction.apply(decoded)
    if b"\\u0000" in data:
        mended = _without_nul(mended)
    return data if mended is decoded else orjson.dumps(mended)


def _all_finite(value: object) -> bool:
    """Whether no float in `value` is NaN or infinite (orjson writes null for those)."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_all_finite(getattr(value, f.name)) for f in dataclasses.fields(value))
    return True


def _without_nul(value: Any) -> Any:
    """`value` with each NUL character as U+FFFD, which Postgres can store (it can't store U+0000)."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    return value


def number_text(value: object, metric_type: str) -> str:
    """Return a metric's value as a JSON number.

    Raises `Refused`: `invalid_value` (no number, beyond 64 bits, or a counter below zero), `not_finite`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise Refused("invalid_value", f"value must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise Refused("not_finite", f"value is not finite: {value}")
    if metric_type == "counter" and value < 0:
        raise Refused("invalid_value", f"a counter's value must not be below zero: {value}")
    if isinstance(value, int) and not -(1 << 63) <= value < (1 << 64):
        raise Refused("invalid_value", "value is an integer beyond 64 bits")
    return str(value) if isinstance(value, Decimal) else orjson.dumps(value).decode()


def encode_event(
    event_id: str, event_type: str, timestamp: str, user_id: str, family_unit_id: str,
    session_id: str | None, metadata: bytes,
) -> bytes:  # fmt: skip
    """Return the line of an event whose parts were checked. `session_id` None is written as null."""
    session = "null" if session_id is None else f'"{session_id}"'
    return (
        f'{{"event_id":"{event_id}","event_type":"{event_type}","timestamp":"{timestamp}",'
        f'"user_id":"{user_id}","family_unit_id":"{family_unit_id}","session_id":{session},'
        f'"metadata":{metadata.decode()}}}\n'
    ).encode()


def encode_metric(
    event_id: str, metric_name: str, metric_type: str, value: str, labels: bytes, timestamp: str
) -> bytes:
    """Return the line of a metric whose parts were checked. `value` is a JSON number."""
    return (
        f'{{"event_id":"{event_id}","metric_name":"{metric_name}","metric_type":"{metric_type}",'
        f'"value":{value},"labels":{labels.decode()},"timestamp":"{timestamp}"}}\n'
    ).encode()
