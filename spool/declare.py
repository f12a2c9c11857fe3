"""Event declarations: `event` adds an event to the catalogue and returns a callable that emits it.

See spool/events.py for its use in applications, and spool/fields.py for the types of fields.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, get_type_hints, overload

from spool.annotations import Who
from spool.awaitable import NOT_EMITTED, Emitted, coroutine_function
from spool.emitter import get_emitter
from spool.fields import DeclarationError, Field, field
from spool.record import NAME, Refused
from spool.suggest import did_you_mean
from spool.words import words

Parameters = ParamSpec("Parameters")

CATALOGUE: Final[dict[str, Event[...]]] = {}
"""All defined events, by name."""

WHO: Final = tuple(Who.__annotations__)
_PREFIX: Final = "log_"


class Event(Generic[Parameters]):
    """An event of the catalogue; calling it emits one."""

    def __init__(self, name: str, description: str, fields: dict[str, Field]) -> None:
        self.name = name
        self.description = description
        self.fields = fields
        self.__name__ = f"{_PREFIX}{name}"
        self.__doc__ = description
        self._arguments = frozenset((*fields, *WHO))

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature that `inspect.signature` and interactive shells show."""
        required = inspect.Parameter.empty
        return inspect.Signature([
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=str(each),
                default=required if each.required else each.default,
            )
            for name, each in self.fields.items()
        ] + [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in WHO
        ])  # fmt: skip

    @coroutine_function
    def __call__(self, *args: Parameters.args, **values: Parameters.kwargs) -> Emitted:
        """Emit one; omitted ids come from the context. Awaiting returns its id, or None if it was dropped."""
        emitter = None
        try:
            emitter = get_emitter()
            awaitable = Emitted()
            awaitable.event_id = self.emit(*args, **values)
        except RecursionError:
            if emitter is not None:
                emitter._drops.too_deep += 1
            return NOT_EMITTED
        return awaitable

    def emit(self, *args: Parameters.args, **values: Parameters.kwargs) -> str | None:
        """Emit one and return its id, or None if it was dropped."""
        emitter = None
        try:
            emitter = get_emitter()
            given: dict[str, Any] = values
            try:
                if args:
                    raise Refused("invalid_metadata", f"{self.name} takes its fields as keyword arguments")
                metadata = self.validated(given)
            except Exception as error:
                emitter.refuse(error, self.name)
                return None
            who = given.get
            return emitter.emit_event(
                event_type=self.name, user_id=who("user_id"), family_unit_id=who("family_unit_id"),
                session_id=who("session_id"), metadata=metadata, event_id=who("event_id"),
                timestamp=who("timestamp"),
            )  # fmt: skip
        except RecursionError:
            if emitter is not None:
                emitter._drops.too_deep += 1
            return None

    def validated(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata as it is written, without None values. Raises `Refused`."""
        if not self._arguments.issuperset(given):
            raise Refused("invalid_metadata", self._unknown(min(given.keys() - self._arguments)))
        written = {}
        for name, each in self.fields.items():
            value = given.get(name)
            if value is not None:
                written[name] = each.validated(name, value)
            elif each.required:
                raise Refused("invalid_metadata", f"{self.name} needs {name}")
            elif each.default is not None:
                written[name] = each.default
        return written

    def _unknown(self, name: str) -> str:
        known = ", ".join(self.fields) or "none"
        return (
            f"{self.name} has no {name}{did_you_mean(name, self._arguments).rstrip('?')}; its fields: {known}"
        )


@overload
def event(function: Callable[Parameters, None], /) -> Event[Parameters]: ...
@overload
def event(name: str, description: str, /, **fields: object) -> Event[...]: ...
def event(declared: Any, description: str = "", /, **fields: Any) -> Event[...]:
    """Define an event and add it to the catalogue, as a decorator or as a call with name, meaning and fields.

    Raises `DeclarationError`, a ValueError, for an invalid name or type, and for a name that is already
    defined with other fields.
    """
    if callable(declared):
        name, description, declarations = _declared(declared)
    else:
        name, declarations = declared, {each: (kind, None) for each, kind in fields.items()}
    _check_name(name, "event")
    made: Event[...] = Event(name, description, {})
    for each, (kind, default) in declarations.items():
        if each in WHO:
            raise DeclarationError(
                f'field "{each}" of event "{name}" is an argument of every event: rename it'
            )
        _check_name(each, f'field of event "{name}"')
        made.fields[each] = field(name, each, kind, default)
    made._arguments |= made.fields.keys()
    if name in CATALOGUE and CATALOGUE[name].fields != made.fields:
        raise DeclarationError(f'event "{name}" is already defined with other fields: choose another name')
    CATALOGUE[name] = made
    return made


def _check_name(name: object, what: str) -> None:
    if isinstance(name, str) and NAME.fullmatch(name):
        return
    suggested = "_".join(words(name)) if isinstance(name, str) else ""
    hint = f'; did you mean "{suggested}"?' if NAME.fullmatch(suggested) else ""
    raise DeclarationError(f"name of {what} must be snake_case of 1 to 100 characters, not {name!r}{hint}")


def _declared(function: Callable[..., object]) -> tuple[str, str, dict[str, tuple[Any, Any]]]:
    """Return the name, meaning and fields (type and default) of an event declared by a function."""
    name = function.__name__
    if not name.startswith(_PREFIX):
        raise DeclarationError(f'function "{name}" declares an event: rename it to "{_PREFIX}{name}"')
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise DeclarationError(f'a type of "{name}" does not exist: {error}') from None
    fields = {}
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.VAR_KEYWORD:
            continue  # see `Who`
        if each.kind is not each.KEYWORD_ONLY:
            raise DeclarationError(f'"{each.name}" of "{name}" must be a keyword: write "*" before it')
        if each.name not in hints:
            raise DeclarationError(f'"{each.name}" of "{name}" must have a type')
        fields[each.name] = hints[each.name], None if each.default is each.empty else each.default
    meaning = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return name.removeprefix(_PREFIX), meaning, fields
