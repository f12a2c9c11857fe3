"""Ordinary values have a JSON form, all others become the name of their type; neither loses the event."""

from __future__ import annotations

import collections
import dataclasses
import enum
import ipaddress
import math
import types
import uuid
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import attrs
import msgspec
import numpy as np
import pydantic
import pytest
from django.utils.functional import SimpleLazyObject, lazystr

from loader.load.decode import Row, decode
from spool import Emitter
from spool.context import bind
from spool.testing import Recorder, record
from tests.emit.lines import emit


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    emitter = Emitter(tmp_path)
    yield emitter
    emitter.close()


@pytest.fixture
def recorder(emitter: Emitter) -> Iterator[Recorder]:
    with record(emitter) as recorder:
        yield recorder


class Colour(enum.Enum):
    RED = "red"
    PRICE = Decimal("1.5")


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Photo:
    width: int
    taken: timedelta
    _private: str = "x"


@dataclasses.dataclass(slots=True)
class Slotted:
    size: Decimal


class Named(NamedTuple):
    x: int
    when: timedelta


class Model(pydantic.BaseModel):
    price: Decimal
    tags: set[str]
    secret: pydantic.SecretStr = pydantic.SecretStr("hunter2")
    hidden: str = pydantic.Field(default="hunter2", exclude=True)


@attrs.define
class Attrs:
    size: Decimal


class Struct(msgspec.Struct):
    size: Decimal


class Stamp(datetime):
    """A datetime that orjson does not write, like pandas' Timestamp."""


class Path2(type(Path())):  # type: ignore[misc]  # the class differs by platform
    def __str__(self) -> str:
        return "hunter2"


MOMENT = datetime(2026, 1, 20, 12, tzinfo=UTC)
ID = uuid.UUID(int=5)
FORMS: list[tuple[Any, Any]] = [
    (Decimal("19.90"), 19.9),
    (Decimal(3), 3.0),
    (Decimal("0.12345678901234567890"), "0.12345678901234567890"),
    (Decimal("1E+400"), "1E+400"),
    (timedelta(minutes=1, milliseconds=500), 60.5),
    ({"b", "a"}, ["a", "b"]),
    (frozenset({3, 1, 2}), [1, 2, 3]),
    (Path("/srv/photos"), "/srv/photos"),
    (PureWindowsPath("a/b"), "a\\b"),
    (Path("/srv/\udcff"), "/srv/\ufffd"),
    (b"text", "text"),
    (b"\xff\x00", "/wA="),
    (bytearray(b"text"), "text"),
    (memoryview(b"text"), "text"),
    (
        Model(price=Decimal("1.5"), tags={"b", "a"}),
        {"price": 1.5, "tags": ["a", "b"], "secret": "[redacted]"},
    ),
    (Photo(3, timedelta(seconds=2)), {"width": 3, "taken": 2.0}),
    (Slotted(Decimal("1.5")), {"size": 1.5}),
    (Attrs(Decimal("1.5")), {"size": 1.5}),
    (Struct(Decimal("1.5")), {"size": 1.5}),
    (Named(1, timedelta(seconds=2)), {"x": 1, "when": 2.0}),
    (np.float32(1.5), 1.5),
    (np.float64(1.5), 1.5),
    (np.int64(3), 3),
    (np.uint8(3), 3),
    (np.longdouble(1.5), 1.5),
    (np.bool_(True), True),  # numpy's constructor
    (np.str_("text"), "text"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (lazystr("welcome"), "welcome"),
    (Colour.RED, "red"),
    (Colour.PRICE, 1.5),
    (Level.HIGH, 3),
    (1 << 64, str(1 << 64)),
    ("half \ud800 pair", "half \ufffd pair"),
    (time(12, 30, tzinfo=UTC), "12:30:00+00:00"),
    (Stamp(2026, 1, 20, 12, tzinfo=UTC), MOMENT.isoformat()),
    (ipaddress.ip_address("::1"), "::1"),
    (collections.deque([1, 2]), [1, 2]),
    ({"a": 1}.keys(), ["a"]),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    (collections.UserDict({"a": Decimal(1)}), {"a": 1.0}),
    (collections.ChainMap({"a": 1}, {"b": 2}), {"b": 2, "a": 1}),
]


def kind_of(value: object) -> str:
    """Return a test id that is equal in every process, although sets have no order."""
    return type(value).__name__


@pytest.mark.parametrize(("value", "form"), FORMS, ids=kind_of)
def test_an_ordinary_value_has_a_json_form(
    emitter: Emitter, recorder: Recorder, value: Any, form: Any
) -> None:
    assert emit(emitter, a=value, deep=[{"b": value}])
    assert emitter.increment_counter(metric_name="hits", labels={"a": value})
    (event,), (metric,) = recorder.events, recorder.metrics
    assert event["metadata"] == {"a": form, "deep": [{"b": form}]}
    assert metric["labels"] == {"a": form}
    assert all(isinstance(decode(line), Row) for line in recorder._lines)
    assert emitter.stats().dropped == {}
    assert emitter.stats().converted == (3 if isinstance(value, Model) else 0)  # its SecretStr


KEYS: list[tuple[Any, str]] = [
    (1, "1"), (1.5, "1.5"), (True, "true"), (None, "null"), (Colour.RED, "red"), (Level.HIGH, "3"),
    (ID, str(ID)), (date(2026, 1, 20), "2026-01-20"), (Decimal("1.5"), "1.5"), (b"key", "key"),
    (Path("/srv"), "/srv"), (np.int64(3), "3"), (lazystr("key"), "key"), ("half \ud800", "half \ufffd"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "name"), KEYS, ids=kind_of)
def test_an_ordinary_key_has_a_text_form(emitter: Emitter, recorder: Recorder, key: Any, name: str) -> None:
    metadata = {"a": 1, key: 2}
    assert emitter.emit_event(event_type="odd", user_id=ID, family_unit_id=ID, metadata=metadata)
    assert recorder.events[0]["metadata"] == {"a": 1, name: 2}
    assert emitter.stats().converted == 0


class Person:
    name = "hunter2"

    def __repr__(self) -> str:
        return "hunter2"

    __str__ = __repr__


class Row2(Person):
    """An object of an ORM, which would query the database for a field."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(name)


def queried() -> Any:
    raise AssertionError("the database was asked")


def generator() -> Iterator[int]:
    yield 1


class Broken(pydantic.BaseModel):
    name: str = "hunter2"

    @pydantic.model_serializer
    def fail(self) -> Any:
        raise LookupError("hunter2")


OTHERS: list[tuple[Any, str]] = [
    (Person(), "Person"), (Person, "type"), (Row2(), "Row2"), (ValueError("hunter2"), "ValueError"),
    (lambda: "hunter2", "function"), (generator(), "generator"), (1j, "complex"), (range(10), "range"),
    (SimpleLazyObject(queried), "SimpleLazyObject"), (pydantic.SecretStr("hunter2"), "SecretStr"),
    (Broken(), "Broken"), (np.broadcast_to(np.int8(1), 1 << 30), "ndarray"), (object(), "object"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "name"), OTHERS, ids=[name for _, name in OTHERS])
def test_anything_else_becomes_the_name_of_its_type_and_is_counted(
    emitter: Emitter, recorder: Recorder, value: Any, name: str
) -> None:
    assert emit(emitter, a=value, b={"c": [value]})
    assert recorder.events[0]["metadata"] == {"a": name, "b": {"c": [name]}}
    assert b"hunter2" not in recorder._lines[0]
    assert emitter.stats().converted == 2
    assert emitter.stats().dropped == {}


def test_types_without_a_form_are_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    emitter = Emitter(tmp_path)
    emit(emitter, a=Person(), b=object())
    emitter._keep_house()
    emitter.close()
    assert '"Person" (1), "object" (1)' in caplog.text


def test_equal_sets_are_equal_payloads(emitter: Emitter, recorder: Recorder) -> None:
    one, other = {f"tag{n}" for n in range(50)}, {f"tag{n}" for n in reversed(range(50))}
    emit(emitter, tags=one)
    emit(emitter, tags=other)
    assert recorder.events[0]["metadata"] == recorder.events[1]["metadata"]


@pytest.mark.parametrize(
    "value",
    [Decimal("NaN"), np.float64("nan"), np.float32("inf"), [{1: math.nan}], {Decimal(1), math.inf}],
    ids=kind_of,
)
def test_a_number_that_is_not_finite_is_refused_beside_values_that_are_converted(
    emitter: Emitter, value: Any
) -> None:
    assert emit(emitter, a=Decimal(1), b=value) is None
    assert emitter.stats().dropped == {"not_finite": 1}


def test_what_refers_to_itself_is_refused_beside_values_that_are_converted(emitter: Emitter) -> None:
    recursive: list[Any] = [Decimal(1)]
    recursive.append(recursive)
    assert emit(emitter, a=recursive) is None
    assert emitter.stats().dropped == {"not_json": 1}


METADATA: list[Any] = [
    Photo(3, timedelta(seconds=2)), Attrs(Decimal(1)), Struct(Decimal(1)), types.MappingProxyType({"a": 1}),
    Model(price=Decimal(1), tags=set()),
]  # fmt: skip


@pytest.mark.parametrize("metadata", METADATA, ids=kind_of)
def test_metadata_itself_may_be_a_model_a_dataclass_or_a_view(
    emitter: Emitter, recorder: Recorder, metadata: Any
) -> None:
    assert emitter.emit_event(event_type="odd", user_id=ID, family_unit_id=ID, metadata=metadata)
    assert recorder.events[0]["metadata"]


@pytest.mark.parametrize("metadata", METADATA, ids=kind_of)
def test_metadata_that_is_no_dictionary_keeps_what_is_bound(
    emitter: Emitter, recorder: Recorder, metadata: Any
) -> None:
    with bind(user_id=ID, family_unit_id=ID, request_id="r"):
        assert emitter.emit_event(event_type="odd", metadata=metadata)
    assert len(recorder.events[0]["metadata"]) > 1
    assert recorder.events[0]["metadata"]["request_id"] == "r"


@pytest.mark.parametrize("metadata", ["text", [1], [("a", 1)], 3, object(), Person()], ids=kind_of)
def test_metadata_that_is_no_object_is_refused(emitter: Emitter, metadata: Any) -> None:
    assert emitter.emit_event(event_type="odd", user_id=ID, family_unit_id=ID, metadata=metadata) is None
    assert emitter.stats().dropped == {"not_json": 1}


# ---- metric values ------------------------------------------------------------------------------------


class Real(float):
    pass


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.float64(1.5), 1.5), (np.float32(1.5), 1.5), (np.float16(1.5), 1.5), (np.longdouble(1.5), 1.5),
        (np.int64(3), 3), (np.uint64(1 << 63), 1 << 63), (np.int8(3), 3), (Real(1.5), 1.5), (Level.HIGH, 3),
    ],
    ids=kind_of,
)  # fmt: skip
def test_a_number_of_numpy_or_of_a_subclass_is_a_value(
    emitter: Emitter, recorder: Recorder, value: Any, number: float
) -> None:
    assert emitter.record_gauge(metric_name="odd", value=value)
    assert recorder.metrics[0]["value"] == number


@pytest.mark.parametrize("value", [np.float32("nan"), np.bool_(1), np.array([1, 2]), "1", True], ids=kind_of)
def test_what_is_no_finite_number_is_no_value(emitter: Emitter, value: Any) -> None:
    assert emitter.record_gauge(metric_name="odd", value=value) is None
    assert sum(emitter.stats().dropped.values()) == 1


def test_a_path_that_lies_about_its_text_is_written_as_it_is_spelt(
    emitter: Emitter, recorder: Recorder
) -> None:
    emit(emitter, a=Path2("/srv"))
    assert recorder.events[0]["metadata"] == {"a": "/srv"}
