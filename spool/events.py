"""The standard events of the application, one catalogue: what each is called, means and carries.

    await log_memory_posted(user_id=user.id, family_unit_id=user.family_unit_id, memory_id=memory.id)
    background_tasks.add_task(log_memory_posted, memory_id=memory.id)      # who comes from the context

An application adds its own in the same way, and so to the reference that `python -m spool.events` prints:

    log_album_shared = event("album_shared", "An album was shared.", album_id=UUID, note=str | None)

A field is named with its type: `str`, `int`, `float`, `bool`, or `UUID` (a `uuid.UUID` or its text); one that
may be left out says `| None`. What does not fit is refused as any line that can't be made: counted, and a
ValueError with `strict`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast, get_args
from uuid import UUID

from spool.emitter import Emitter, get_emitter
from spool.interruption import is_foreign
from spool.record import Refused, uuid_text

Function = TypeVar("Function", bound=Callable[..., Any])
Source = str | Callable[[dict[str, Any], Any], Any]
"""Where a decorator finds a value: a dotted path, or a function of the call's arguments and its result."""

CATALOGUE: Final[dict[str, Event]] = {}
"""Every event that was defined, by name."""


@dataclass(frozen=True)
class Field:
    """A value in an event's metadata."""

    kind: type
    required: bool

    def validated(self, name: str, value: Any) -> Any:
        """Return the value as it is written. Raises `Refused` (cause `invalid_metadata`)."""
        if self.kind is UUID:
            return uuid_text(value, name)
        if (isinstance(value, bool) and self.kind is not bool) or not isinstance(value, self.kind):
            kinds = f"{self.kind.__name__}, not {type(value).__name__}"
            raise Refused("invalid_metadata", f"{name} must be {kinds}")
        return value


class Event:
    """An event of the catalogue; awaiting a call of it emits one."""

    def __init__(self, name: str, description: str, fields: dict[str, Field]) -> None:
        self.name = name
        self.description = description
        self.fields = fields
        self.__name__ = f"log_{name}"

    async def __call__(
        self, *, user_id: Any = None, family_unit_id: Any = None, session_id: Any = None,
        event_id: Any = None, timestamp: Any = None, **metadata: Any,
    ) -> str | None:  # fmt: skip
        """Emit one; what is not given comes from the context. Returns its id, None if it was dropped."""
        emitter = None
        try:
            emitter = get_emitter()
            return self.emit(
                user_id=user_id, family_unit_id=family_unit_id, session_id=session_id, event_id=event_id,
                timestamp=timestamp, **metadata,
            )  # fmt: skip
        except RecursionError:
            if emitter is not None:
                emitter._drops.too_deep += 1
            return None

    def emit(
        self, *, user_id: Any = None, family_unit_id: Any = None, session_id: Any = None,
        event_id: Any = None, timestamp: Any = None, **metadata: Any,
    ) -> str | None:  # fmt: skip
        """The same without await."""
        emitter = None
        try:
            emitter = get_emitter()
            try:
                checked = self.validated(metadata)
            except Exception as error:
                emitter.refuse(error, self.name)
                return None
            return emitter.emit_event(
                event_type=self.name, user_id=user_id, family_unit_id=family_unit_id, session_id=session_id,
                metadata=checked, event_id=event_id, timestamp=timestamp,
            )  # fmt: skip
        except RecursionError:
            if emitter is not None:
                emitter._drops.too_deep += 1
            return None

    def validated(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the metadata as it is written, without what is None. Raises `Refused`."""
        unknown = metadata.keys() - self.fields.keys()
        if unknown:
            known = ", ".join(self.fields) or "none"
            raise Refused("invalid_metadata", f"{self.name} has no {min(unknown)}; its fields: {known}")
        written = {}
        for name, field in self.fields.items():
            value = metadata.get(name)
            if value is not None:
                written[name] = field.validated(name, value)
            elif field.required:
                raise Refused("invalid_metadata", f"{self.name} needs {name}")
        return written


def event(name: str, description: str, **fields: Any) -> Event:
    """Define an event and add it to the catalogue. Raises ValueError for a name that is defined otherwise."""
    made = Event(name, description, {field: _field(kind) for field, kind in fields.items()})
    if name in CATALOGUE and CATALOGUE[name].fields != made.fields:
        raise ValueError(f"event {name} is defined already, with other fields")
    CATALOGUE[name] = made
    return made


def _field(annotation: Any) -> Field:
    if isinstance(annotation, types.UnionType):
        (kind,) = (each for each in get_args(annotation) if each is not types.NoneType)
        return Field(kind, required=False)
    return Field(annotation, required=True)


def emits(name: str, **sources: Source) -> Callable[[Function], Function]:
    """Emit an event of the catalogue each time the decorated function, sync or async, returns.

        @app.post("/memories")
        @emits("memory_posted", memory_id="result.id", media_type="memory.media_type")
        async def post_memory(memory: Memory) -> Posted: ...

    A source is a dotted path that begins with an argument's name or with `result`, through attributes or
    keys, or a function of the arguments and the result. Sources may be named `user_id` and so on, too. The
    result, an exception and the signature are left as they are; a source that is not there is counted as a
    drop. Raises KeyError for an event that the catalogue does not have.
    """
    wanted = CATALOGUE[name]

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        def emit(emitter: Emitter, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            try:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                values = {each: _resolve(source, bound.arguments, result) for each, source in sources.items()}
            except Exception as error:
                if is_foreign(error):
                    raise
                problem = f"cannot take the metadata of {name} from the call: {type(error).__name__}: {error}"
                emitter.refuse(Refused("invalid_metadata", problem), name)
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

        return cast(Function, awaited if inspect.iscoroutinefunction(function) else called)

    return decorate


def _resolve(source: Source, arguments: dict[str, Any], result: Any) -> Any:
    if callable(source):
        return source(arguments, result)
    first, *rest = source.split(".")
    value = result if first == "result" else arguments[first]
    for name in rest:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


log_user_registered = event("user_registered", "An account was made.", method=str | None)
log_user_logged_in = event("user_logged_in", "A user came in.", method=str | None)
log_user_logged_out = event("user_logged_out", "A user left.")
log_memory_posted = event(
    "memory_posted", "A memory was posted.", memory_id=UUID, media_type=str | None, media_count=int | None
)
log_memory_updated = event("memory_updated", "A memory was changed.", memory_id=UUID)
log_memory_deleted = event("memory_deleted", "A memory was deleted.", memory_id=UUID)
log_memory_viewed = event(
    "memory_viewed", "A memory was looked at.", memory_id=UUID, duration_ms=int | None, source=str | None
)
log_reaction_created = event(
    "reaction_created", "Somebody reacted to a memory.", memory_id=UUID, reaction_id=UUID | None,
    reaction_type=str | None,
)  # fmt: skip
log_reaction_deleted = event(
    "reaction_deleted", "A reaction was taken back.", memory_id=UUID, reaction_id=UUID | None,
    reaction_type=str | None,
)  # fmt: skip
log_comment_created = event(
    "comment_created", "A memory was commented.", memory_id=UUID, comment_id=UUID, length=int | None
)
log_comment_updated = event("comment_updated", "A comment was changed.", memory_id=UUID, comment_id=UUID)
log_comment_deleted = event("comment_deleted", "A comment was deleted.", memory_id=UUID, comment_id=UUID)
log_feed_viewed = event("feed_viewed", "A user looked at the feed.", page=int | None, memory_count=int | None)
log_invite_created = event(
    "invite_created", "Somebody was invited into a family.", invite_id=UUID, invited_role=str | None
)
log_invite_accepted = event(
    "invite_accepted", "An invited person joined the family.", invite_id=UUID, invited_role=str | None
)
log_child_provisioned = event("child_provisioned", "A child got an account.", child_id=UUID)
log_pet_created = event("pet_created", "A pet was added to the family.", pet_id=UUID, species=str | None)


def reference() -> str:
    """Return the catalogue as a table in Markdown."""
    rows = ["| event | meaning | metadata |", "|---|---|---|"]
    for each in CATALOGUE.values():
        fields = ", ".join(
            f"`{name}` {field.kind.__name__}{'' if field.required else ', optional'}"
            for name, field in each.fields.items()
        ).replace(", `", "; `")
        rows.append(f"| `{each.name}` | {each.description} | {fields} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
