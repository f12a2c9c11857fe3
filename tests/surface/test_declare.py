"""An invalid declaration is refused when it is declared, with a suggestion."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, Unpack
from uuid import UUID

import numpy as np
import pytest
from django.utils.functional import lazystr

from spool.events import CATALOGUE, DeclarationError, Who, emits, event, log_memory_posted
from spool.testing import Recorder, recorder

__all__ = ["recorder"]

USER = uuid.uuid4()
WHO: dict[str, Any] = {"user_id": USER, "family_unit_id": USER}
AlbumId = NewType("AlbumId", UUID)


@pytest.fixture(autouse=True)
def own_catalogue() -> Iterator[None]:
    before = dict(CATALOGUE)
    yield
    CATALOGUE.clear()
    CATALOGUE.update(before)


class Kind(enum.Enum):
    PHOTO = "photo"


def test_an_event_is_declared_by_a_function(recorder: Recorder) -> None:
    @event
    def log_album_shared(
        *, album_id: UUID | str, audience: Literal["family", "public"], size: float | None = None,
        count: int = 1, **who: Unpack[Who],
    ) -> None:  # fmt: skip
        """An album was shared.

        A longer explanation.
        """

    log_album_shared(album_id=USER, audience="family", size=3, **WHO)
    assert recorder.of("album_shared")[0]["metadata"] == {
        "album_id": str(USER), "audience": "family", "size": 3, "count": 1
    }  # fmt: skip
    assert CATALOGUE["album_shared"].description == "An album was shared."
    with pytest.raises(ValueError, match=r'audience must be .*, not "famly"; did you mean "family"'):
        log_album_shared.emit(album_id=USER, audience="famly", **WHO)  # type: ignore[arg-type]  # the mistake


KINDS: list[tuple[Any, Any, Any]] = [
    (float, 3, 3),
    (float, np.float32(1.5), 1.5),
    (float, Decimal("1.5"), 1.5),
    (int, np.int64(3), 3),
    (str, lazystr("text"), "text"),
    (str, Path("/srv"), "/srv"),
    (str, Kind.PHOTO, "photo"),
    (Kind, Kind.PHOTO, "photo"),
    (list[str], ["a"], ["a"]),
    (list, {"a"}, ["a"]),
    (dict[str, int], {"a": 1}, {"a": 1}),
    (Decimal, Decimal("1.5"), 1.5),
    (dt.date, dt.date(2026, 1, 20), "2026-01-20"),
    (str | int | None, 3, 3),
    (Optional[str], "a", "a"),  # noqa: UP045  # as applications write it
    (AlbumId, USER, str(USER)),
    (Annotated[int, "x"], 3, 3),
    (Literal[1, "a"], 1, 1),
    (Any, {"a": True}, {"a": True}),
    (bool, True, True),
]


@pytest.mark.parametrize(("kind", "value", "form"), KINDS, ids=lambda value: type(value).__name__)
def test_a_field_takes_what_has_the_form_of_its_type(
    recorder: Recorder, kind: Any, value: Any, form: Any
) -> None:
    event("odd_field", "Something happened.", value=kind).emit(value=value, **WHO)
    assert recorder.of("odd_field")[0]["metadata"] == {"value": form}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (float, True), (float, "3"), (int, True), (int, 1.5), (int, "3"), (str, 3), (str, object()), (bool, 1),
        (UUID, 3), (UUID, "nobody"), (list[str], "a"), (Literal["a"], "b"), (Literal[1], True), (str, {"a"}),
        (str | int, 1.5),
    ],
)  # fmt: skip
def test_a_field_refuses_what_has_not(recorder: Recorder, kind: Any, value: Any) -> None:
    declared = event("odd_field", "Something happened.", value=kind)
    with pytest.raises(ValueError, match=r"^value "):
        declared.emit(value=value, **WHO)
    assert not recorder.records


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("AlbumShared", {}, '"?AlbumShared.*did you mean "album_shared"'),
        ("album shared", {}, 'did you mean "album_shared"'),
        ("a" * 101, {}, "must be snake_case of 1 to 100 characters"),
        (3, {}, "name of event must be snake_case"),
        ("shared", {"albumId": UUID}, 'name of field of event "shared".*did you mean "album_id"'),
        ("shared", {"user_id": UUID}, 'field "user_id" of event "shared" is an argument of every event'),
        ("shared", {"note": "str"}, "must have a type such as str, int or UUID, not 'str'"),
        ("shared", {"note": "strr"}, 'did you mean "str"'),
        ("shared", {"note": 3}, 'field "note" of event "shared" must have a type'),
        ("shared", {"note": None}, "must have a type other than None"),
        ("memory_posted", {"note": str}, "already defined with other fields"),
    ],
)
def test_a_wrong_event_is_refused_at_its_declaration(name: Any, fields: dict[str, Any], words: str) -> None:
    before = dict(CATALOGUE)
    with pytest.raises(DeclarationError, match=words):
        event(name, "Something happened.", **fields)
    assert before == CATALOGUE


def test_a_wrong_function_is_refused_at_its_declaration() -> None:
    def album_shared(*, note: str) -> None: ...
    def log_positional(note: str) -> None: ...
    def log_untyped(*, note) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001  # the mistake

    for function, words in (
        (album_shared, 'rename it to "log_album_shared"'),
        (log_positional, '"note" of "log_positional" must be a keyword'),
        (log_untyped, '"note" of "log_untyped" must have a type'),
    ):
        with pytest.raises(DeclarationError, match=words):
            event(function)


def post(media_type: str, media: dict[str, int]) -> None: ...


SOURCES: list[tuple[Any, dict[str, Any], str]] = [
    ("memory_postd", {}, '"memory_postd" does not exist; did you mean "memory_posted"'),
    ("nothing_like_it_at_all", {}, "does not exist: define it"),
    ("memory_posted", {"memory_idd": "result"}, 'has no field "memory_idd"; did you mean "memory_id"'),
    ("memory_posted", {"media_type": "media_type"}, 'event "memory_posted" needs a source for "memory_id"'),
    ("memory_posted", {"memory_id": "reslt.id"}, 'not "reslt"; did you mean "result"'),
    ("memory_posted", {"memory_id": "result.id", "media_type": "media_typ"}, 'did you mean "media_type"'),
    ("memory_posted", {"memory_id": "result..id"}, "must be names with dots between them"),
    ("memory_posted", {"memory_id": ""}, "must start with an argument"),
    ("memory_posted", {"memory_id": 3}, "must be a path or a function, not int"),
    ("memory_posted", {"memory_id": lambda result: result}, "must take the arguments and the result"),
    ("memory_posted", {"memory_id": "result", "usr_id": "result"}, 'did you mean "user_id"'),
]


@pytest.mark.parametrize(("name", "sources", "words"), SOURCES)
def test_a_wrong_source_is_refused_when_the_function_is_decorated(
    name: Any, sources: dict[str, Any], words: str
) -> None:
    with pytest.raises(DeclarationError, match=words) as raised:
        emits(name, **sources)(post)
    assert isinstance(raised.value, ValueError) and isinstance(raised.value, KeyError)


def test_emits_takes_an_event_itself(recorder: Recorder) -> None:
    @emits(log_memory_posted, memory_id="result", user_id="result", family_unit_id="result")
    def answer() -> UUID:
        return USER

    answer()
    assert recorder.of("memory_posted")


def test_a_misspelt_field_of_a_call_is_named(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match='has no media_typ; did you mean "media_type"'):
        log_memory_posted.emit(memory_id=USER, media_typ="photo", **WHO)  # type: ignore[call-arg]  # the mistake
    with pytest.raises(ValueError, match="takes its fields as keyword arguments"):
        log_memory_posted.emit(USER, **WHO)  # type: ignore[call-arg]  # the mistake
