"""Ids derived from the application's own keys, and events without a person or family.

The tables identify people and families by UUID. An application with integer or text keys maps them:

    emit_event(event_type="order_paid", user_id=analytics_uuid("user", 42), family_unit_id=...)

`analytics_uuid(kind, text)` of schema.sql computes the same UUID, so that a query can join on the
application's key. The UUID is the first 128 bits of the SHA-256 of `kind`, a colon and the key's text in
UTF-8, with the bits for version 8 (RFC 9562, section 5.8) and the variant set. The mapping must never change:
existing rows would lose their person.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final, overload
from uuid import UUID

from spool.record import NAME, encode_actor, uuid_text

_VERSION: Final = 8 << 76
_VARIANT: Final = 2 << 62
_DIGEST_BITS: Final = (1 << 128) - 1 ^ 0xF << 76 ^ 3 << 62


@overload
def analytics_uuid(kind: str, key: int | str) -> UUID: ...
@overload
def analytics_uuid(kind: str, key: None) -> None: ...


def analytics_uuid(kind: str, key: int | str | None) -> UUID | None:
    """Return the UUID of a person, family or session that the application identifies by an integer or a text.

    `kind` is snake_case, such as `user` or `family`, so that user 1 and family 1 have different UUIDs. None
    stays None.

    >>> analytics_uuid("user", 42)
    UUID('ea3fd43b-e1e5-8d62-a163-dae19fc740bd')
    >>> analytics_uuid("user", 42) == analytics_uuid("user", "42")
    True

    Raises ValueError for a kind that is not snake_case and for a text that Postgres cannot hold (a NUL
    character, a lone surrogate), and TypeError for a key of another type.
    """
    if key is None:
        return None
    if not NAME.fullmatch(kind):
        raise ValueError(f"kind must be snake_case of 1 to 100 characters: {kind!r}")
    digest = sha256(f"{kind}:{_text(key)}".encode()).digest()
    return UUID(int=int.from_bytes(digest[:16]) & _DIGEST_BITS | _VERSION | _VARIANT)


def _text(key: int | str) -> str:
    if isinstance(key, str):
        text = str.__str__(key)
        if "\0" in text:
            raise ValueError("the key has a NUL character, which Postgres cannot store")
        return text
    if isinstance(key, int) and not isinstance(key, bool):
        return str(int.__int__(key))
    raise TypeError(f"the key must be an integer or a text, not {type(key).__name__}")


def encode_optional_actor(user_id: object, family_unit_id: object, session_id: object) -> bytes:
    """Return what `record.encode_actor` does, with null for a person or family that is None.

    Raises `Refused` (see `record.uuid_text`).
    """
    if user_id is not None and family_unit_id is not None:
        return encode_actor(user_id, family_unit_id, session_id)
    return b'","user_id":%b,"family_unit_id":%b,"session_id":%b,"metadata":' % (
        _optional(user_id, "user_id"), _optional(family_unit_id, "family_unit_id"),
        _optional(session_id, "session_id"),
    )  # fmt: skip


def _optional(value: object, field: str) -> bytes:
    return b"null" if value is None else b'"%b"' % uuid_text(value, field).encode()
