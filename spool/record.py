"""The line format of the spool: one event or one metric as JSON, and its limits.

This module never opens a file. It encodes an application's values as the bytes of one line, or refuses them
with a reason. The loader checks UUIDs, timestamps, names and limits with the same functions.

    {"event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata"}
    {"event_id", "metric_name", "metric_type", "value", "labels", "timestamp"}

Invariants of an encoded line: it is JSON in UTF-8, ends with its only newline, and has no NUL byte, no
escaped NUL, no lone surrogate and no number that is not finite, so Postgres can store it
(https://www.postgresql.org/docs/current/datatype-json.html).

Methods defined by an application never influence what is written. `__str__`, `__eq__`, `__hash__` or
`__iter__` of a subclass may return anything, so the contents of a subclass are read through its base class,
and only objects of exact built-in types are looked up in a memo.

All functions are pure, apart from caches of validated parts ("memos"). A memo is bounded in entries and,
because it only takes short keys, in bytes. Any thread may read and write it: a lost write only costs a
repeated check. The emitter joins the parts.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from numbers import Integral, Real
from operator import index
from typing import Any, Final
from uuid import UUID

import orjson

from spool.alterations import Alterations
from spool.convert import Converter
from spool.interruption import is_foreign
from spool.redaction import Redaction
from spool.refused import Refused as Refused  # noqa: PLC0414  # re-exported

EVENT_KEYS: Final = (
    "event_id", "event_type", "timestamp", "user_id", "family_unit_id", "session_id", "metadata",
)  # fmt: skip
METRIC_KEYS: Final = ("event_id", "metric_name", "metric_type", "value", "labels", "timestamp")
METRIC_TYPES: Final = frozenset({"counter", "gauge", "timer", "histogram"})
NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,99}", re.ASCII)
"""snake_case, 1 to 100 characters: the width of `event_type` and `metric_name` in schema.sql."""

MAX_LINE_BYTES: Final = 4 << 20
"""The longest line that the loader reads, one chunk (the loader's CHUNK_BYTES). It rejects longer lines."""

MEMO_SIZE: Final = 8192
"""Entries at which a memo is cleared: more than the users active within one second. Keys are names of at most
100 characters and UUIDs of at most 45, so a full memo takes about 6 MiB."""

PLAIN_NUMBER_LIMIT: Final = 1 << 63
"""A number from 0 to below this is a valid value for a metric of any type."""

_BACKSLASH: Final = ord("\\")
_SHOWN_CHARACTERS: Final = 100
_RAW_WHITESPACE: Final = bytes.maketrans(b"\t\r\n", b"   ")


_EVENT_NAME_AT: Final = len('{"event_id":"0190163d-8694-739b-aea5-966c26f8ad91","event_type":"')
_METRIC_NAME_AT: Final = len('{"event_id":"0190163d-8694-739b-aea5-966c26f8ad91","metric_name":"')


def name_of(line: bytes) -> str:
    """Return the event type or the metric's name of an encoded line."""
    start = _METRIC_NAME_AT if line.startswith(b"metric", _METRIC_NAME_AT - 14) else _EVENT_NAME_AT
    return line[start : line.index(b'"', start)].decode()


# ---- errors -------------------------------------------------------------------------------------------


def refusal(error: Exception) -> Refused:
    """Return the reason why a line could not be encoded, as a `Refused`.

    Re-raises `error` if it belongs to the application; see `is_foreign`.
    """
    if isinstance(error, Refused):
        return error
    if isinstance(error, RecursionError):  # first, because there may be no frame left for further checks
        return Refused("recursion", "the recursion limit is too near to encode a line")
    if is_foreign(error):
        raise error
    if isinstance(error, orjson.JSONEncodeError):
        return Refused("not_json", f"metadata or labels cannot be written as JSON: {error}")
    return Refused("invalid", f"{type(error).__name__}: {error}")


def _shown(value: object) -> str:
    """Return how a message shows a value: the beginning of a text, otherwise the type."""
    if isinstance(value, str):
        return repr(str.__str__(value)[:_SHOWN_CHARACTERS])
    return f"an object of type {type(value).__name__}"


# ---- UUIDs --------------------------------------------------------------------------------------------

_DIGITS: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_UUID: Final = re.compile(
    rf"({_DIGITS})|([0-9a-f]{{32}})|\{{({_DIGITS})\}}|urn:uuid:({_DIGITS})", re.ASCII | re.IGNORECASE
)


def canonical_uuid(text: str) -> str | None:
    """Return a UUID's text in lower case with hyphens, or None if it is not a UUID.

    Accepts the canonical form in either case, 32 hex digits, and the canonical form in braces or after
    `urn:uuid:` (RFC 9562, section 4). Unlike `uuid.UUID`, it rejects `0x`, `_` and hyphens in other places.

    >>> canonical_uuid("{0190163D-8694-739B-AEA5-966C26F8AD91}")
    '0190163d-8694-739b-aea5-966c26f8ad91'
    """
    match = _UUID.fullmatch(text)
    if match is None:
        return None
    canonical, digits, braced, urn = match.groups()
    return _hyphenated(digits.lower()) if digits else (canonical or braced or urn).lower()


def _hyphenated(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def uuid_text(value: object, field: str) -> str:
    """Return the canonical text of a UUID given as `uuid.UUID` or text.

    >>> uuid_text("0190163D-8694-739B-AEA5-966C26F8AD91", "user_id")
    '0190163d-8694-739b-aea5-966c26f8ad91'

    Raises `Refused` (cause `invalid_uuid`, or `missing` for None).
    """
    if value is None:
        raise Refused(
            "missing",
            f"{field} is missing: pass it to the call or bind it to the context, or set "
            f"SPOOL_IDENTITY=optional",
        )
    text = None
    if isinstance(value, UUID):
        # Not `UUID.__dict__["int"]`: asyncpg's UUID claims to be a subclass and has a different memory
        # layout.
        number = value.int
        if isinstance(number, int) and 0 <= number < 1 << 128:
            text = _hyphenated(f"{int.__int__(number):032x}")
    elif isinstance(value, str):
        text = canonical_uuid(str.__str__(value))
    if text is None:
        remedy = "; spool.analytics_uuid makes one from the application's own key"
        raise Refused("invalid_uuid", f"{field} is not a UUID: {_shown(value)}{remedy}")
    return text


# ---- timestamps ---------------------------------------------------------------------------------------

_TIMESTAMP: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ]([01]\d|2[0-3]):([0-5]\d):([0-5]\d|60)(?:\.(\d+))?"
    r"(?:[Zz]|([+-])([01]\d|2[0-3]):([0-5]\d))?",
    re.ASCII,
)


def parse_timestamp(text: str) -> datetime:
    """Parse RFC 3339 text; the result has no `tzinfo` if the text has no offset.

    Digits beyond microseconds are truncated. A leap second, which UTC inserts at the end of a month (RFC
    3339, section 5.7), becomes the first second of the next month, as in Postgres. Raises ValueError for
    other text.
    """
    match = _TIMESTAMP.fullmatch(text)
    if match is None:
        raise ValueError("not RFC 3339")
    *numbers, fraction, sign, hours, minutes = match.groups()
    year, month, day, hour, minute, second = map(int, numbers)
    micros = int((fraction or "0")[:6].ljust(6, "0"))
    leap = second == 60
    moment = datetime(year, month, day, hour, minute, second - leap, micros)
    if sign is None and text[-1] not in "Zz":
        return moment
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    moment = moment.replace(tzinfo=timezone(-offset if sign == "-" else offset))
    return _after_leap_second(moment) if leap else moment


def _after_leap_second(last: datetime) -> datetime:
    try:
        moment = last.astimezone(UTC) + timedelta(seconds=1)
    except OverflowError:
        raise ValueError("out of range") from None
    if (moment.day, moment.hour, moment.minute, moment.second) != (1, 0, 0, 0):
        raise ValueError("no leap second")
    return moment


def utc_text(moment: datetime) -> str:
    """Return `2026-01-20T12:00:00.000001Z` for an aware datetime.

    Raises OverflowError if it is outside the years 1 to 9999 in UTC.
    """
    # An exact datetime with the same fields: a subclass (pandas' Timestamp) has an `isoformat` of its own.
    plain = datetime.combine(datetime.date(moment), datetime.timetz(moment)).astimezone(UTC)
    return plain.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def encode_timestamp(value: object) -> bytes:
    """Return RFC 3339 text for a caller's timestamp: an aware `datetime` or its text.

    Raises `Refused` (cause `invalid_timestamp`) if it has no offset, is not a timestamp or is out of range.
    """
    try:
        moment = value if isinstance(value, datetime) else parse_timestamp(_plain_str(value))
    except (ValueError, TypeError) as error:
        if is_foreign(error):
            raise
        raise Refused("invalid_timestamp", f"timestamp is not RFC 3339: {_shown(value)}") from None
    if moment.utcoffset() is None:
        raise Refused("invalid_timestamp", f"timestamp has no offset: {_shown(value)}; add tzinfo")
    try:
        return utc_text(moment).encode()
    except OverflowError:
        raise Refused("invalid_timestamp", f"timestamp is out of range: {_shown(value)}") from None


def _plain_str(value: object) -> str:
    """Return the contents of a string. Raises TypeError if it is not one."""
    return str.__str__(value)


# ---- metadata, labels, values -------------------------------------------------------------------------


def encode_object(value: object, field: str, redaction: Redaction, alterations: Alterations) -> bytes:
    """Return `metadata` or `labels` as a JSON object without secrets, ready to be put into a line.

    The JSON that orjson writes is decoded and encoded again. This only matters for `orjson.Fragment`, which
    may hold newlines, duplicate keys, or no JSON at all. Values that orjson cannot write are converted by
    spool/convert.py.

    Raises `Refused`: `not_json` (not an object, recursive, nested too deeply, or with an invalid fragment),
    `not_finite` (NaN or infinity).
    """
    if value is None:
        return b"{}"
    try:
        decoded = _decoded(value, alterations)
    except orjson.JSONDecodeError as error:
        raise Refused("not_json", f"{field} has an orjson.Fragment that is not JSON: {error}") from None
    if type(decoded) is not dict:
        raise Refused("not_json", f"{field} must be an object, not {type(value).__name__}")
    return orjson.dumps(redaction.redact(decoded, alterations))


def _decoded(value: object, alterations: Alterations) -> Any:
    """Return a value decoded from its JSON. Raises `Refused` and orjson.JSONDecodeError."""
    try:
        data = orjson.dumps(value)
    except TypeError as error:
        if is_foreign(error):
            raise
        return Converter(alterations).convert(value)
    decoded = orjson.loads(data)
    if b"null" in data and not _all_finite(value):
        raise Refused("not_finite", "metadata or labels have a number that is not finite")
    return _without_nul(decoded) if b"\\u0000" in data else decoded


def _all_finite(value: object) -> bool:
    """Whether every float in `value` is finite (orjson writes null for the others)."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_all_finite, dict.values(value)))
    if isinstance(value, list):
        return all(map(_all_finite, list.__iter__(value)))
    if isinstance(value, tuple):
        return all(map(_all_finite, tuple.__iter__(value)))
    if isinstance(value, enum.Enum):
        return _all_finite(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        slots = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        return all(map(_all_finite, [*slots, *getattr(value, "__dict__", {}).values()]))
    return True


def _without_nul(value: Any) -> Any:
    """Return `value` with each NUL character, which Postgres cannot store, replaced by U+FFFD."""
    if isinstance(value, str):
        return value.replace("\0", "\ufffd")
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    return value


def encode_number(value: object, metric_type: str) -> bytes:
    """Return a metric's value as a JSON number.

    Raises `Refused`: `invalid_value` (not a number, an integer beyond 64 bits, a Decimal beyond the range of
    a double, or a counter below zero), `not_finite`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        data = _encode_int(int.__int__(value))
    elif isinstance(value, float):
        data = _encode_float(float.__float__(value))
    elif isinstance(value, Decimal):
        data = _encode_decimal(value)
    elif isinstance(value, Integral) and not isinstance(value, bool):  # such as numpy's
        data = _encode_int(int.__int__(index(value)))
    elif isinstance(value, Real) and not isinstance(value, int):
        data = _encode_float(float(value))
    else:
        raise Refused("invalid_value", f"value must be a number, not {type(value).__name__}")
    if metric_type == "counter" and data.startswith(b"-") and data != b"-0.0":
        raise Refused("invalid_value", f"a counter's value must not be below zero: {data[:40].decode()}")
    return data


def _encode_int(value: int) -> bytes:
    if not -(1 << 63) <= value < (1 << 64):
        raise Refused("invalid_value", "value is an integer beyond 64 bits")
    return orjson.dumps(value)


def _encode_float(value: float) -> bytes:
    if not math.isfinite(value):
        raise Refused("not_finite", f"value is not finite: {value}")
    return orjson.dumps(value)


def _encode_decimal(value: Decimal) -> bytes:
    if not Decimal.is_finite(value):
        raise Refused("not_finite", "value is not finite")
    if Decimal.is_zero(value):  # `-0E+5` is one, too
        return b"0"
    text = Decimal.__str__(value)
    nearest = float(text)
    if math.isinf(nearest) or nearest == 0:
        raise Refused("invalid_value", f"value is beyond the range of a double: {text[:_SHOWN_CHARACTERS]}")
    return text.encode()


# ---- names and actors ---------------------------------------------------------------------------------


def _remember(memo: dict[Any, bytes], key: object, part: bytes) -> bytes:
    if len(memo) >= MEMO_SIZE:
        memo.clear()
    memo[key] = part
    return part


EVENT_NAMES: Final[dict[str, bytes]] = {}
"""Recent results of `encode_event_name`, by type. Look up exact `str`s only."""
METRIC_NAMES: Final[dict[str, dict[str, bytes]]] = {metric_type: {} for metric_type in METRIC_TYPES}
"""Recent results of `encode_metric_name`, by type and name. Look up exact `str`s only."""
_ACTORS: Final[dict[tuple[int | str, int | str, int | str | None], bytes]] = {}


def encode_event_name(event_type: object) -> bytes:
    """Return `","event_type":"...","timestamp":"`. Raises `Refused` (`invalid_name`)."""
    name = _checked_name(event_type, "event_type")
    return _remember(EVENT_NAMES, name, b'","event_type":"%b","timestamp":"' % name.encode())


def encode_metric_name(metric_type: object, metric_name: object) -> bytes:
    """Return `","metric_name":"...","metric_type":"...","value":`.

    Raises `Refused` (`invalid_type`, `invalid_name`).
    """
    kind = str.__str__(metric_type) if isinstance(metric_type, str) else None
    if kind not in METRIC_TYPES:
        raise Refused("invalid_type", f"metric_type is unknown: {_shown(metric_type)}")
    name = _checked_name(metric_name, "metric_name")
    part = b'","metric_name":"%b","metric_type":"%b","value":' % (name.encode(), kind.encode())
    return _remember(METRIC_NAMES[kind], name, part)


def _checked_name(name: object, field: str) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(plain := str.__str__(name)):
        raise Refused("invalid_name", f"{field} must be snake_case of 1 to 100 characters: {_shown(name)}")
    return plain


def encode_actor(user_id: object, family_unit_id: object, session_id: object) -> bytes:
    """Return `","user_id":"...","family_unit_id":"...","session_id":...,"metadata":`.

    Raises `Refused` (see `uuid_text`).
    """
    # The key for a UUID is its number: hashing the object runs Python code, hashing an int does not. An int
    # passed by the caller is not looked up, so it cannot be mistaken for the UUID with that number.
    user: int | str
    family: int | str
    session: int | str | None
    if type(user_id) is UUID:
        user = user_id.int
    elif type(user_id) is str:
        user = user_id
    else:
        return _encode_actor(user_id, family_unit_id, session_id)
    if type(family_unit_id) is UUID:
        family = family_unit_id.int
    elif type(family_unit_id) is str:
        family = family_unit_id
    else:
        return _encode_actor(user_id, family_unit_id, session_id)
    if type(session_id) is UUID:
        session = session_id.int
    elif session_id is None or type(session_id) is str:
        session = session_id
    else:
        return _encode_actor(user_id, family_unit_id, session_id)
    key = user, family, session
    if (actor := _ACTORS.get(key)) is not None:
        return actor
    return _remember(_ACTORS, key, _encode_actor(user_id, family_unit_id, session_id))


def _encode_actor(user_id: object, family_unit_id: object, session_id: object) -> bytes:
    user, family = uuid_text(user_id, "user_id"), uuid_text(family_unit_id, "family_unit_id")
    session = "null" if session_id is None else f'"{uuid_text(session_id, "session_id")}"'
    return f'","user_id":"{user}","family_unit_id":"{family}","session_id":{session},"metadata":'.encode()
