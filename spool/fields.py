"""A field of an event: the values it accepts, derived from its annotation.

    str, int, float, bool, UUID, datetime, an enum, any other class       its instances
    X | None                                                              optional
    X | Y, Literal["photo", "video"], list[str], NewType, Annotated       as in a type checker

In addition to what a type checker accepts, an int is accepted for a float, text for a UUID, a numpy number
for an int or a float, and any value whose JSON form (spool/convert.py) has the field's type, such as a lazy
string for text.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Annotated, Any, Final, Literal, NewType, Union, cast, get_args, get_origin
from uuid import UUID

from spool.alterations import Alterations
from spool.convert import Converter
from spool.record import Refused, uuid_text
from spool.suggest import did_you_mean

_ORDINARY: Final = ("str", "int", "float", "bool", "UUID", "datetime", "date", "Decimal", "list", "dict")


class DeclarationError(ValueError, KeyError):
    """An invalid event, field or source. Also a KeyError, for a name that does not exist."""

    __str__ = BaseException.__str__  # KeyError shows a message in quotation marks


@dataclass(frozen=True)
class Field:
    """A field of an event's metadata."""

    kinds: tuple[type, ...]
    """Types of its values; empty if it accepts only `literals`."""
    literals: tuple[object, ...]
    required: bool
    default: Any = None

    @property
    def kind(self) -> type:
        """The first of its types, which the reference shows."""
        if UUID in self.kinds:
            return UUID
        return self.kinds[0] if self.kinds else type(self.literals[0])

    def validated(self, name: str, value: Any) -> Any:
        """Return the value as it is written. Raises `Refused` (cause `invalid_metadata`, `invalid_uuid`)."""
        kinds, kind = self.kinds, cast(type, type(value))
        if UUID in kinds and issubclass(kind, (UUID, str)):
            return uuid_text(value, name)
        if kind in kinds or object in kinds or (kind is not bool and issubclass(kind, kinds)):
            return value
        if self.literals and any(value == each and kind is type(each) for each in self.literals):
            return value
        if kind is not bool:
            if float in kinds and issubclass(kind, Real):
                return value if issubclass(kind, int) else float(value)
            if int in kinds and issubclass(kind, Integral):
                return index(value)
        return self._converted(name, value)

    def _converted(self, name: str, value: Any) -> Any:
        unknown = Alterations()
        if self.kinds and type(value) not in (str, int, float, bool):
            made = Converter(unknown).convert(value)
            if type(made) in self.kinds and not unknown.converted():
                return made
        raise Refused("invalid_metadata", f"{name} must be {self}, not {_shown(value, self.literals)}")

    def __str__(self) -> str:
        return " or ".join([
            *(kind.__name__ for kind in dict.fromkeys(self.kinds) if not (kind is str and UUID in self.kinds)),
            *(repr(each) for each in self.literals),
        ])  # fmt: skip


def _shown(value: Any, literals: Iterable[object]) -> str:
    if literals and type(value) is str:
        return f'"{value[:100]}"{did_you_mean(value, (str(each) for each in literals))}'
    return type(value).__name__


def field(event: str, name: str, annotation: Any, default: Any = None) -> Field:
    """Return the field that an annotation declares. Raises `DeclarationError`."""
    kinds: list[type] = []
    literals: list[object] = []
    for part in _parts(annotation):
        if isinstance(part, _Literals):
            literals += part.values
        elif isinstance(part, type):
            kinds.append(part)
        else:
            shown = repr(part)[:100]
            hint = did_you_mean(part, _ORDINARY)
            raise DeclarationError(
                f'field "{name}" of event "{event}" must have a type such as str, int or UUID, not {shown}{hint}'
            )
    optional = types.NoneType in kinds or None in literals
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    literals = [each for each in literals if each is not None]
    if not kinds and not literals:
        raise DeclarationError(f'field "{name}" of event "{event}" must have a type other than None')
    return Field(tuple(kinds), tuple(literals), required=not optional and default is None, default=default)


@dataclass(frozen=True)
class _Literals:
    values: list[object]


def _parts(annotation: Any) -> list[Any]:
    """Return the members of a union: classes, literals, and anything else unchanged."""
    origin = get_origin(annotation)
    if origin is Union or origin is types.UnionType:
        return [part for member in get_args(annotation) for part in _parts(member)]
    if origin is Literal:
        return [_Literals(list(get_args(annotation)))]
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if isinstance(annotation, NewType):
        return _parts(annotation.__supertype__)
    if annotation is None:
        return [types.NoneType]
    if annotation is Any:
        return [object]
    if origin is not None:
        return [origin]
    value = getattr(annotation, "__value__", None)  # of a `type` statement (Python 3.12)
    return [annotation] if value is None else _parts(value)
