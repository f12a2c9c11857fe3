"""A decorator that emits an event each time a function returns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from spool.declare import CATALOGUE, WHO, Event
from spool.emitter import Emitter, get_emitter
from spool.fields import DeclarationError
from spool.interruption import is_foreign
from spool.kinds import Kind, kind_of
from spool.record import Refused
from spool.suggest import did_you_mean

Function = TypeVar("Function", bound=Callable[..., Any])
Source = str | Callable[[dict[str, Any], Any], Any]
"""The source of a field's value: a dotted path, or a function of the call's arguments and its result."""

_RESULT = "result"


def emits(name: str | Event[...], **sources: Source) -> Callable[[Function], Function]:
    """Emit an event of the catalogue each time the decorated function, sync or async, returns.

        @app.post("/memories")
        @emits("memory_posted", memory_id="result.id", media_type="memory.media_type")
        async def post_memory(memory: Memory) -> Posted: ...

    A source is a dotted path of attributes or keys that starts with an argument's name or with `result`, or
    it is a function of the arguments and the result. `user_id`, `family_unit_id` and the like may have
    sources, too. The result, exceptions and the signature of the function are unchanged. If a source does not
    exist in a call, the event is dropped and counted.

    Raises `DeclarationError`, a ValueError and KeyError, for an event or a field that does not exist, a
    required field without a source, a source that does not start with an argument of the function, and a
    generator.
    """
    wanted = _event(name)
    _check_fields(wanted, sources)

    def decorate(function: Function) -> Function:
        kind = kind_of(function)
        if kind not in {Kind.RESULT, Kind.COROUTINE}:
            raise DeclarationError(
                f'event "{wanted.name}" cannot be emitted by a generator, which has no single return'
            )
        signature = inspect.signature(function)
        for each, source in sources.items():
            _check_source(wanted.name, each, source, signature.parameters, function)

        def emit(emitter: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            try:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                values = {each: _resolve(source, bound.arguments, result) for each, source in sources.items()}
            except Exception as error:
                if is_foreign(error):
                    raise
                problem = f"cannot take the metadata of {wanted.name} from the call: {type(error).__name__}: {error}"
                emitter.refuse(Refused("invalid_metadata", problem), wanted.name)
            else:
                wanted.emit(**values)

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            result = await function(*args, **kwargs)
            emitter = None
            try:
                emitter = get_emitter()
                emit(emitter, args, kwargs, result)
            except RecursionError:
                if emitter is not None:
                    emitter._drops.too_deep += 1
            return result

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            emitter = None
            try:
                emitter = get_emitter()
                emit(emitter, args, kwargs, result)
            except RecursionError:
                if emitter is not None:
                    emitter._drops.too_deep += 1
            return result

        return cast(Function, awaited if kind is Kind.COROUTINE else called)

    return decorate


def _event(name: str | Event[...]) -> Event[...]:
    if isinstance(name, Event):
        return name
    if name in CATALOGUE:
        return CATALOGUE[name]
    hint = did_you_mean(name, CATALOGUE) or ": define it with spool.events.event"
    raise DeclarationError(f'event "{name}" does not exist{hint}')


def _check_fields(wanted: Event[...], sources: Mapping[str, object]) -> None:
    known = [*wanted.fields, *WHO]
    for each in sources:
        if each not in known:
            fields = ", ".join(wanted.fields) or "none"
            raise DeclarationError(
                f'event "{wanted.name}" has no field "{each}"{did_you_mean(each, known)}; its fields: {fields}'
            )
    for each, field in wanted.fields.items():
        if field.required and each not in sources:
            raise DeclarationError(f'event "{wanted.name}" needs a source for "{each}"')


def _check_source(
    event: str, field: str, source: object, parameters: Mapping[str, object], function: Callable[..., object]
) -> None:
    """Raise `DeclarationError` if the source cannot exist in any call of the function."""
    what = f'source of "{field}" of event "{event}"'
    if isinstance(source, str):
        first, *rest = source.split(".")
        known = [*parameters, _RESULT]
        if first not in known:
            where = getattr(function, "__qualname__", "the function")
            hint = did_you_mean(first, known)
            raise DeclarationError(
                f'{what} must start with an argument of {where} or "{_RESULT}", not "{first}"{hint}'
            )
        if not all(rest):
            raise DeclarationError(f'{what} must be names with dots between them, not "{source}"')
    elif callable(source):
        _check_callable(what, source)
    else:
        raise DeclarationError(f"{what} must be a path or a function, not {type(source).__name__}")


def _check_callable(what: str, source: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(source)
    except (TypeError, ValueError):  # a C function without a signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise DeclarationError(
            f"{what} must take the arguments and the result, but takes {signature}"
        ) from None


def _resolve(source: Source, arguments: dict[str, Any], result: Any) -> Any:
    if callable(source):
        return source(arguments, result)
    first, *rest = source.split(".")
    value = result if first == _RESULT else arguments[first]
    for name in rest:
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value
