"""A line of the spool: one event or one metric as JSON, and the limits it must keep.

This room never opens a file. It turns values that were given by an application into the bytes of one
line, or refuses them with a reason; the loader reads the same limits from here.

    {"event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"}
    {"event_id", "metric_name", "metric_type", "value", "labels", "timestamp"}

What always holds of an encoded line: it is UTF-8, ends with the only newline in it, has no NUL byte and no
escaped NUL, no lone surrogate and no number that is not finite, so Postgres can store it
(https://www.postgresql.org/docs/current/datatype-json.html).

Everything here is a pure function but for bounded memos of parts that were checked before; they may be read
and written from any thread, because a lost write only costs checking once more. The emitter joins the parts.
"""

from __future__ import annotations

import dataclasses
import math
import re
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
"""Entries after which a memo starts anew; some 4 MiB, more users than are active within one second."""

PLAIN_NUMBER_LIMIT: Final = 1 << 63
"""A number from 0 to below this is a metric's value of any type as it stands."""


class Refused(ValueError):
    """What was given can't become a line. `cause` is the word it is counted under."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def refusal(error: Exception) -> Refused:
    """Return why a line could not be made as one of ours."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, orjson.JSONEncodeError):
        return Refused("not_json", f"metadata or labels can't be written as JSON: {error}")
    return Refused("invalid", f"{type(error).__name__}: {error}")


def uuid_text(value: object, field: str) -> str:
    """Return the canonical text of a UUID given as `uuid.UUID` or text.

    >>> uuid_text("0190163D-8694-739B-AEA5-966C26F8AD91", "user_id")
    '0190163d-8694-739b-aea5-966c26f8ad91'

    Raises `Refused` (cause `invalid_uuid`, or `missing` for None).
    """
    if value is None:
        raise Refused("missing", f"{field} is missing: give it to the call or bind it to the context")
    try:
        return str(value if isinstance(value, UUID) else UUID(str(value)))
    except ValueError:
        raise Refused("invalid_uuid", f"{field} is not a UUID: {str(value)[:100]!r}") from None


def encode_timestamp(value: object) -> bytes:
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
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z").encode()
    except OverflowError:
        raise Refused("invalid_timestamp", f"timestamp is out of range: {str(value)[:100]!r}") from None


def encode_object(value: object, field: str, redaction: Redaction) -> bytes:
    """Return `metadata` or `labels` as a JSON object without secrets, ready to be put into a line.

    Raises `Refused`: `not_json` (a type JSON has not, a key that is not a string, a lone surrogate, an
    integer beyond 64 bits, a recursive or too deeply nested value), `not_finite` (NaN or infinity).
    """
    if value is None:
        return b"{}"
    if not isinstance(value, dict):
        raise Refused("not_json", f"{field} must be an object, not {type(value).__name__}")
    try:
        data = orjson.dumps(value)
    except TypeError as error:
        raise refusal(error) from None
    if b"null" in data and not _all_finite(value):
        raise Refused("not_finite", f"{field} has a number that is not finite")
    decoded = orjson.loads(data)
    cleaned = redaction.apply(decoded)
    if b"\\u0000" in data:
        cleaned = _without_nul(cleaned)
    return data if cleaned is decoded else orjson.dumps(cleaned)


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


def encode_number(value: object, metric_type: str) -> bytes:
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
    return str(value).encode() if isinstance(value, Decimal) else orjson.dumps(value)


def _remember(memo: dict[Any, bytes], key: object, part: bytes) -> bytes:
    if len(memo) >= MEMO_SIZE:
        memo.clear()
    memo[key] = part
    return part


EVENT_NAMES: Final[dict[Any, bytes]] = {}
"""What `encode_event_name` returned lately, by type."""
METRIC_NAMES: Final[dict[Any, dict[Any, bytes]]] = {metric_type: {} for metric_type in METRIC_TYPES}
"""What `encode_metric_name` returned lately, by type and name."""
_ACTORS: Final[dict[Any, bytes]] = {}


def encode_event_name(event_type: object) -> bytes:
    """Return `","event_type":"...","timestamp":"`. Raises `Refused` (`invalid_name`)."""
    part = b'","event_type":"%b","timestamp":"' % _checked_name(event_type, "event_type")
    return _remember(EVENT_NAMES, event_type, part)


def encode_metric_name(metric_type: object, metric_name: object) -> bytes:
    """Return `","metric_name":"...","metric_type":"...","value":`.

    Raises `Refused` (`invalid_type`, `invalid_name`).
    """
    if not isinstance(metric_type, str) or metric_type not in METRIC_TYPES:
        raise Refused("invalid_type", f"metric_type is unknown: {str(metric_type)[:100]!r}")
    names = _checked_name(metric_name, "metric_name"), metric_type.encode()
    part = b'","metric_name":"%b","metric_type":"%b","value":' % names
    return _remember(METRIC_NAMES[metric_type], metric_name, part)


def _checked_name(name: object, field: str) -> bytes:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = str(name)[:120]
        raise Refused("invalid_name", f"{field} must be snake_case of 1 to 100 characters: {shown!r}")
    return name.encode()


def encode_actor(user_id: Any, family_unit_id: Any, session_id: Any) -> bytes:
    """Return `","user_id":"...","family_unit_id":"...","session_id":...,"metadata":`.

    Raises `Refused` (see `uuid_text`).
    """
    key = (
        # A UUID is known by its number: hashing the object runs Python code, hashing an int does not.
        user_id.int if type(user_id) is UUID else user_id,
        family_unit_id.int if type(family_unit_id) is UUID else family_unit_id,
        session_id.int if type(session_id) is UUID else session_id,
    )
    if (actor := _ACTORS.get(key)) is not None:
        return actor
    user, family = uuid_text(user_id, "user_id"), uuid_text(family_unit_id, "family_unit_id")
    session = "null" if session_id is None else f'"{uuid_text(session_id, "session_id")}"'
    text = f'","user_id":"{user}","family_unit_id":"{family}","session_id":{session},"metadata":'
    return _remember(_ACTORS, key, text.encode())
