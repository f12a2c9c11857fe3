"""Converts values to JSON that orjson cannot serialize.

    value                                   JSON
    Decimal                                 a number if a double holds all its digits, else text
    subclass of float, int; numpy number    a number; text for an integer beyond 64 bits
    timedelta                               seconds
    datetime, date, time, UUID              text, also for a subclass
    set, frozenset                          an array, sorted so that equal sets make equal events
    tuple, deque, views of a dictionary     an array; a named tuple: an object
    pydantic model, dataclass, attrs,       an object of the fields that can be read without running code of the
    msgspec.Struct                          application; for a pydantic model the result of `model_dump`
    Path, IP address, URL, lazy string      text
    bytes                                   text if it is UTF-8, else base64
    numpy array                             an array
    Enum                                    its value
    a key                                   text of the above; true, false and null as in JSON

Any other value becomes the name of its type and is counted. `repr` is never used, because it could contain
personal data, nor is `__class__` read, because that would make Django's lazy objects query the database.

Lone surrogates and NUL characters, which Postgres cannot store, are replaced by U+FFFD.
"""

from __future__ import annotations

import binascii
import collections
import enum
import math
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePath
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import orjson

from spool.alterations import Alterations
from spool.interruption import is_foreign
from spool.refused import Refused

_MAX_DEPTH: Final = 100
"""Each level takes four frames, and Python's default recursion limit is 1000."""
_MAX_ITEMS: Final = 1 << 20
"""Longer numpy arrays are not converted: they cannot fit into the longest line, 4 MiB."""


class Converter:
    """Converts one value. `alterations` counts values without a JSON form."""

    def __init__(self, alterations: Alterations) -> None:
        self._alterations = alterations
        self._depth = 0

    def convert(self, value: object) -> Any:
        """Return a value as exact built-in types, which orjson can serialize.

        Raises `Refused`: `not_json` if it is nested too deeply, `not_finite` for NaN and infinity.
        """
        kind = type(value)
        if kind is str:
            return text(value)
        if kind is bool or value is None:
            return value
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Refused("not_json", f"a value is recursive or nested more than {_MAX_DEPTH} levels deep")
        try:
            form = _form_of(kind)
            return self._name_of(kind) if form is None else form(self, value)
        except (Refused, RecursionError, orjson.JSONDecodeError):
            raise
        except Exception as error:
            if is_foreign(error):
                raise
            return self._name_of(kind)  # application code failed
        finally:
            self._depth -= 1

    def array(self, value: Iterable[object]) -> list[Any]:
        """Return the JSON form of each item."""
        return [self.convert(item) for item in value]

    def mapping(self, items: Iterable[tuple[object, object]]) -> dict[str, Any]:
        """Return an object of keys and values. A key that occurs twice is counted; its last value is kept."""
        made: dict[str, Any] = {}
        for key, value in items:
            name = self._key(key)
            if name in made:
                self._alterations.count_converted(text(type(key).__name__))
            made[name] = self.convert(value)
        return made

    def _key(self, key: object) -> str:
        converted = self.convert(key)
        if type(converted) is str:
            return converted
        if type(converted) in (dict, list):
            return self._name_of(type(key))
        return orjson.dumps(converted).decode()

    def _name_of(self, kind: type) -> str:
        name = text(kind.__name__)
        self._alterations.count_converted(name)
        return name


Form = Callable[[Converter, Any], Any]


def text(value: object) -> str:
    """Return the contents of a string without NUL characters and lone surrogates."""
    plain = str.__str__(value)
    if "\0" in plain:
        plain = plain.replace("\0", "\ufffd")
    if not plain.isascii():
        plain = plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return plain


def _integer(_: Converter, value: int) -> int | str:
    plain = int.__int__(value)
    return plain if -(1 << 63) <= plain < 1 << 64 else str(plain)


def _real(_: Converter, value: float) -> float:
    plain = float.__float__(value)
    if not math.isfinite(plain):
        raise Refused("not_finite", "metadata or labels have a number that is not finite")
    return plain


def _decimal(converter: Converter, value: Decimal) -> float | str:
    if not Decimal.is_finite(value):
        raise Refused("not_finite", "metadata or labels have a number that is not finite")
    exact = Decimal.__str__(value)
    nearest = float(exact)
    return nearest if math.isfinite(nearest) and Decimal(repr(nearest)) == Decimal(exact) else exact


def _datetime(_: Converter, value: datetime) -> str:
    return datetime.combine(datetime.date(value), datetime.timetz(value)).isoformat()


def _date(_: Converter, value: date) -> str:
    return date(value.year, value.month, value.day).isoformat()


def _uuid(_: Converter, value: UUID) -> str:
    return str(
        UUID(int=value.int)
    )  # not the attribute of the class: asyncpg's UUID has a different memory layout


def _bytes(_: Converter, value: bytes | bytearray | memoryview) -> str:
    plain = bytes(value)
    try:
        return text(plain.decode())
    except UnicodeDecodeError:
        return binascii.b2a_base64(plain, newline=False).decode()


def _set(converter: Converter, value: Iterable[object]) -> list[Any]:
    return sorted(converter.array(value), key=orjson.dumps)


def _tuple(converter: Converter, value: tuple[object, ...]) -> Any:
    items = tuple.__iter__(value)
    names = getattr(type(value), "_fields", None)
    if type(names) is tuple:
        return converter.mapping(zip(names, items, strict=True))
    return converter.array(items)


def _enum(converter: Converter, value: enum.Enum) -> Any:
    return converter.convert(value._value_)


def _fields(converter: Converter, value: object, names: Iterable[str]) -> dict[str, Any]:
    """Return an object of attributes, without private ones (like orjson) and unset ones."""
    state = getattr(value, "__dict__", None)
    pairs = []
    for name in names:
        if name.startswith("_"):
            continue
        if state is not None and name in state:
            pairs.append((name, state[name]))
        elif hasattr(type(value), name):  # a slot
            pairs.append((name, object.__getattribute__(value, name)))
    return converter.mapping(pairs)


def _numpy_scalar(converter: Converter, value: Any) -> Any:
    item = value.item()
    return converter.convert(
        float(item) if type(item) is type(value) else item
    )  # longdouble has no other JSON form


def _numpy_array(converter: Converter, value: Any) -> Any:
    if value.size > _MAX_ITEMS:
        raise ValueError("too long")
    return converter.convert(value.tolist())


def _pydantic_model(converter: Converter, value: Any) -> Any:
    if not hasattr(type(value), "model_dump"):  # version 1
        return converter.convert(value.dict())
    return converter.convert(value.model_dump(warnings=False))


_BY_BASE: Final[dict[type, Form]] = {
    str: lambda _, value: text(value),
    int: _integer,
    float: _real,
    Decimal: _decimal,
    datetime: _datetime,
    date: _date,
    time: lambda _, value: time.isoformat(value),
    timedelta: lambda _, value: timedelta.total_seconds(value),
    UUID: _uuid,
    PurePath: lambda _, value: text(PurePath.__str__(value)),
    bytes: _bytes, bytearray: _bytes, memoryview: _bytes,
    dict: lambda converter, value: converter.mapping(dict.items(value)),
    MappingProxyType: lambda converter, value: converter.mapping(value.items()),
    collections.UserDict: lambda converter, value: converter.convert(value.data),
    collections.ChainMap: lambda converter, value: converter.mapping(value.items()),
    list: lambda converter, value: converter.array(list.__iter__(value)),
    collections.deque: Converter.array,
    collections.UserList: lambda converter, value: converter.convert(value.data),
    collections.UserString: lambda converter, value: converter.convert(value.data),
    type({}.keys()): Converter.array, type({}.values()): Converter.array, type({}.items()): Converter.array,
    tuple: _tuple,
    set: _set, frozenset: _set,
    enum.Enum: _enum,
    orjson.Fragment: lambda converter, value: converter.convert(orjson.loads(orjson.dumps(value))),
}  # fmt: skip
"""Converters for a type and its subclasses."""

_BY_NAME: Final[dict[tuple[str, str], Form]] = {
    ("numpy", "generic"): _numpy_scalar,
    ("numpy", "ndarray"): _numpy_array,
    ("pydantic.main", "BaseModel"): _pydantic_model,
    ("pydantic.v1.main", "BaseModel"): _pydantic_model,
    ("msgspec", "Struct"): lambda converter, value: _fields(converter, value, value.__struct_fields__),
    **{
        (module, name): lambda _, value: text(str(value))
        for module, name in (
            ("ipaddress", "_IPAddressBase"), ("pydantic.networks", "_BaseUrl"),
            ("pydantic_core._pydantic_core", "Url"), ("yarl", "URL"), ("yarl._url", "URL"),
            ("django.utils.functional", "Promise"), ("flask_babel.speaklater", "LazyString"),
            ("quart_babel.speaklater", "LazyString"), ("babel.support", "LazyProxy"),
            ("speaklater", "_LazyString"), ("lazy_string", "LazyString"),
        )
    },
}  # fmt: skip
"""Converters for types of packages that this one does not import."""


def _form_of(kind: type) -> Form | None:
    """Return the converter for a type, or None if there is none."""
    bases: tuple[type, ...] = type.__dict__["__mro__"].__get__(kind)
    for base in bases:
        form = _BY_BASE.get(base)
        if form is None:
            name = type.__dict__["__name__"].__get__(base)
            form = _BY_NAME.get((getattr(base, "__module__", ""), name))
        if form is not None:
            return form
        if "__dataclass_fields__" in base.__dict__:
            return lambda converter, value: _fields(converter, value, value.__dataclass_fields__)
        if "__attrs_attrs__" in base.__dict__:
            return lambda converter, value: _fields(
                converter, value, [each.name for each in value.__attrs_attrs__]
            )
    return None
