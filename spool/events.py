"""The catalogue of standard events: their names, meanings and fields.

    log_memory_posted(user_id=user.id, family_unit_id=user.family_unit_id, memory_id=memory.id)
    await log_memory_posted(memory_id=memory.id)                           # ids come from the context
    background_tasks.add_task(log_memory_posted, memory_id=memory.id)

Each call emits immediately, with or without `await`. Applications add their own events in the same way;
`python -m spool.events` prints a reference of all events. A function without a body declares the fields, so
that type checkers and editors know them:

    @event
    def log_album_shared(*, album_id: UUID | str, note: str | None = None, **who: Unpack[Who]) -> None:
        \"\"\"An album was shared.\"\"\"

The same without static types: `event("album_shared", "An album was shared.", album_id=UUID, note=str |
None)`. See spool/fields.py for the types of fields. An event with an invalid field is dropped and counted;
with `strict` it raises ValueError.
"""

from __future__ import annotations

from typing import Unpack
from uuid import UUID

from spool.annotations import Who
from spool.declare import CATALOGUE, Event, event
from spool.emits import Source, emits
from spool.fields import DeclarationError, Field

__all__ = [
    "CATALOGUE",
    "DeclarationError",
    "Event",
    "Field",
    "Source",
    "Who",
    "emits",
    "event",
    "log_child_provisioned",
    "log_comment_created",
    "log_comment_deleted",
    "log_comment_updated",
    "log_feed_viewed",
    "log_invite_accepted",
    "log_invite_created",
    "log_memory_deleted",
    "log_memory_posted",
    "log_memory_updated",
    "log_memory_viewed",
    "log_pet_created",
    "log_reaction_created",
    "log_reaction_deleted",
    "log_user_logged_in",
    "log_user_logged_out",
    "log_user_registered",
    "reference",
]  # fmt: skip


@event
def log_user_registered(*, method: str | None = None, **who: Unpack[Who]) -> None:
    """A user account was created."""


@event
def log_user_logged_in(*, method: str | None = None, **who: Unpack[Who]) -> None:
    """A user logged in."""


@event
def log_user_logged_out(**who: Unpack[Who]) -> None:
    """A user logged out."""


@event
def log_memory_posted(
    *,
    memory_id: UUID | str,
    media_type: str | None = None,
    media_count: int | None = None,
    **who: Unpack[Who],
) -> None:
    """A memory was posted."""


@event
def log_memory_updated(*, memory_id: UUID | str, **who: Unpack[Who]) -> None:
    """A memory was edited."""


@event
def log_memory_deleted(*, memory_id: UUID | str, **who: Unpack[Who]) -> None:
    """A memory was deleted."""


@event
def log_memory_viewed(
    *, memory_id: UUID | str, duration_ms: int | None = None, source: str | None = None, **who: Unpack[Who]
) -> None:
    """A memory was viewed."""


@event
def log_reaction_created(
    *,
    memory_id: UUID | str,
    reaction_id: UUID | str | None = None,
    reaction_type: str | None = None,
    **who: Unpack[Who],
) -> None:
    """A reaction was added to a memory."""


@event
def log_reaction_deleted(
    *,
    memory_id: UUID | str,
    reaction_id: UUID | str | None = None,
    reaction_type: str | None = None,
    **who: Unpack[Who],
) -> None:
    """A reaction was removed."""


@event
def log_comment_created(
    *, memory_id: UUID | str, comment_id: UUID | str, length: int | None = None, **who: Unpack[Who]
) -> None:
    """A comment was posted on a memory."""


@event
def log_comment_updated(*, memory_id: UUID | str, comment_id: UUID | str, **who: Unpack[Who]) -> None:
    """A comment was edited."""


@event
def log_comment_deleted(*, memory_id: UUID | str, comment_id: UUID | str, **who: Unpack[Who]) -> None:
    """A comment was deleted."""


@event
def log_feed_viewed(*, page: int | None = None, memory_count: int | None = None, **who: Unpack[Who]) -> None:
    """A user viewed the feed."""


@event
def log_invite_created(*, invite_id: UUID | str, invited_role: str | None = None, **who: Unpack[Who]) -> None:
    """An invitation to a family was sent."""


@event
def log_invite_accepted(
    *, invite_id: UUID | str, invited_role: str | None = None, **who: Unpack[Who]
) -> None:
    """An invited person joined a family."""


@event
def log_child_provisioned(*, child_id: UUID | str, **who: Unpack[Who]) -> None:
    """An account was created for a child."""


@event
def log_pet_created(*, pet_id: UUID | str, species: str | None = None, **who: Unpack[Who]) -> None:
    """A pet was added to a family."""


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
