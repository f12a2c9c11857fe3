"""Redaction: values under keys that name secrets or personal data must not leave the process.

A key is sensitive if its words (spool/words.py) contain an entry of one of the two named sets, `secrets` and
`personal_data` (spool/sensitive.py), or of the application's own list. It is not sensitive if the next or the
last word shows that the value only describes the secret (`password_strength`), or if the first word makes it
a question (`has_password`).

    key                  value                            written
    user_password        "hunter2"                        "[redacted]"
    prompt_tokens        12                               12              a different word than `token`
    token                12, true, null                   unchanged       numbers and booleans are not secrets
    latitude, phone      52.5, 4930123                    "[redacted]"  but may be personal data
    cookies              {"theme": "dark"}, ["a"]         "[redacted]"  the whole value, if it contains text
    name, value          "authorization", "Bearer ..."    "authorization", "[redacted]"
    [["authorization", "Bearer ..."]]                     [["authorization", "[redacted]"]]

Values under other keys are not searched for secrets.

Applications use the same few keys repeatedly, so the result for a key is memoized.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Final, NamedTuple

from spool.alterations import Alterations
from spool.sensitive import ABOUT, HARMLESS_RUNS, NAME_KEYS, PREDICATES, SENSITIVE_SETS, VALUE_KEYS
from spool.words import words

REDACTED: Final = "[redacted]"

DEFAULTS: Final = ("service", "release", "environment")
"""The settings that an emitter adds to the metadata of events and the labels of metrics."""
CONTEXT_KEYS: Final = frozenset({"role", "request_id", "trace_id", *DEFAULTS})
"""The keys that a bound context adds to the metadata of events (spool/context.py)."""

_MEMO_SIZE: Final = 4096
_MEMO_KEY_LENGTH: Final = 128
"""Longer keys are checked each time: clients may choose them, and a full memo must stay below 3 MiB."""
_PAIR: Final = 2


class Sensitivity(IntEnum):
    """The sensitivity of the value under a key."""

    NONE = 0
    BESIDE_NAME = 1
    """Sensitive if the object also names something sensitive: see `VALUE_KEYS`."""
    TEXT = 2
    """Sensitive if it is or contains text."""
    NUMBERS = 3
    """Sensitive if it is or contains text or a number."""


_NONE, _BESIDE_NAME, _TEXT, _NUMBERS = Sensitivity  # module-level names are looked up faster than members


class _Entry(NamedTuple):
    sensitivity: Sensitivity
    at_beginning: bool = False
    at_end: bool = False


class Redaction:
    """The active sets of sensitive words. Safe to share between threads."""

    def __init__(self, changes: Iterable[str] = ()) -> None:
        """`changes` are words to add, and `-secrets` or `-personal_data` to disable that set."""
        self._runs: dict[tuple[str, ...], _Entry] = {}
        given = frozenset(changes)
        for name, entries in SENSITIVE_SETS.items():
            if f"-{name}" not in given:
                self._add(entries.text, _TEXT)
                self._add(entries.numbers, _NUMBERS)
        self._add((entry for entry in given if not entry.startswith("-")), _TEXT)
        self._longest = max(map(len, self._runs), default=0)
        self._beginnings = frozenset(run[0] for run in self._runs)
        self.spares_context = not any(map(self._examine, CONTEXT_KEYS))
        """Whether none of the keys that a bound context adds to metadata is sensitive."""
        self.harmless: set[object] = set()
        """Recently checked keys that are not sensitive, whatever other keys the object has."""
        self.harmless_beside_context: set[object] = set()
        """`harmless` without the keys that a bound context adds to an event's metadata."""
        self._unnamed: set[object] = set()
        """The checked keys of `harmless` and of `VALUE_KEYS`, without those of `NAME_KEYS`."""
        self._unnamed_beside_context: set[object] = set()
        self._others: dict[str, Sensitivity] = {}
        """Recently checked keys that are not harmless."""

    def _add(self, entries: Iterable[str], sensitivity: Sensitivity) -> None:
        for entry in entries:
            run = words(entry)
            if run:
                found = _Entry(sensitivity, entry.startswith("^"), entry.endswith("$"))
                self._runs[run] = self._runs[words("".join(run))] = found

    def sensitivity(self, key: str) -> Sensitivity:
        """Return the sensitivity of values under the key, an exact `str`."""
        if key in self.harmless:
            return _NONE
        known = self._others.get(key)
        if known is not None:
            return known
        found = self._examine(key)
        if len(key) <= _MEMO_KEY_LENGTH:
            self._remember(key, found)
        return found

    def _remember(self, key: str, found: Sensitivity) -> None:
        if len(self.harmless) + len(self._others) >= _MEMO_SIZE:
            self.harmless.clear()
            self.harmless_beside_context.clear()
            self._unnamed.clear()
            self._unnamed_beside_context.clear()
            self._others.clear()
        if found <= _BESIDE_NAME and key not in NAME_KEYS:
            self._unnamed.add(key)
            if key not in CONTEXT_KEYS:
                self._unnamed_beside_context.add(key)
        if found:
            self._others[key] = found
            return
        self.harmless.add(key)
        if key not in CONTEXT_KEYS:
            self.harmless_beside_context.add(key)

    def _examine(self, key: str) -> Sensitivity:
        found = self._of_words(words(key))
        folded = key.casefold()
        if found is _NONE and folded != key:  # `PaSsWoRd`
            found = self._of_words(words(folded))
        if found is _NONE and key in VALUE_KEYS:
            return _BESIDE_NAME
        return found

    def _of_words(self, split: tuple[str, ...]) -> Sensitivity:
        found = _NONE
        if not self._beginnings.isdisjoint(split) and split[0] not in PREDICATES:
            for start, word in enumerate(split):
                if word in self._beginnings:
                    found = max(found, self._of_runs_at(split, start))
        return found

    def _of_runs_at(self, split: tuple[str, ...], start: int) -> Sensitivity:
        """Return the sensitivity of the entries that start with the word at `start`."""
        found = _NONE
        for end in range(start + 1, min(start + self._longest, len(split)) + 1):
            entry = self._runs.get(split[start:end])
            if (
                entry is None
                or (entry.at_beginning and start > 0)
                or (entry.at_end and end < len(split))
                or split[end : end + 1] in _ABOUT
                or (end < len(split) and split[-1] in ABOUT)
                or split[max(0, start - 1) : end] in _HARMLESS_RUNS
            ):
                continue
            found = max(found, entry.sensitivity)
        return found

    def spares(self, flat: Any, harmless: set[object]) -> bool:
        """Whether a dictionary of text, numbers, booleans and None is known to have nothing to redact.

        True if its keys are in `harmless`, or were checked before and their values are not sensitive. This
        takes a sixth of the time of decoding and encoding the JSON, and a third of that if the only keys not
        in `harmless` are those of `VALUE_KEYS`, without one of `NAME_KEYS`, as in `{"value": 3}`.
        """
        unnamed = self._unnamed if harmless is self.harmless else self._unnamed_beside_context
        if unnamed.issuperset(flat):
            return True
        names_value = False
        for key, value in flat.items():
            if key not in harmless:
                sensitivity = self._others.get(key) if type(key) is str else None
                if sensitivity is None or (sensitivity >= _TEXT and _is_sensitive(value, sensitivity)):
                    return False
                names_value = names_value or sensitivity is _BESIDE_NAME
        if names_value and not NAME_KEYS.isdisjoint(flat):
            return not any(self._names_sensitive(key, value) for key, value in flat.items())
        return True

    def _names_sensitive(self, key: str, name: object) -> bool:
        """Whether `name`, the value under `key`, is a sensitive name for a value in the same object."""
        return (
            type(name) is str
            and key in NAME_KEYS
            and len(name) <= _MEMO_KEY_LENGTH
            and self.sensitivity(name) >= _TEXT
        )

    def redact(self, value: Any, alterations: Alterations) -> Any:
        """Replace every sensitive value in decoded JSON, in place, and count each. Return `value`."""
        kind = type(value)
        if kind is dict:
            self._redact_object(value, alterations)
        elif kind is list:
            self._redact_list(value, alterations)
        return value

    def _redact_object(self, value: dict[str, Any], alterations: Alterations) -> None:
        harmless, holds_pair = self.harmless, False
        for key, item in value.items():
            if key not in harmless:
                sensitivity = self.sensitivity(key)
                if sensitivity >= _TEXT and _is_sensitive(item, sensitivity):
                    value[key] = REDACTED
                    alterations.count_redacted(key)
                    continue
                holds_pair = holds_pair or sensitivity is _BESIDE_NAME
            kind = type(item)
            if kind is dict or kind is list:
                self.redact(item, alterations)
        if holds_pair:
            self._redact_named(value, alterations)

    def _redact_named(self, value: dict[str, Any], alterations: Alterations) -> None:
        """Redact the values of an object such as `{"name": "authorization", "value": ...}`."""
        for name_key, name in value.items():
            if not self._names_sensitive(name_key, name):
                continue
            sensitivity = self.sensitivity(name)
            for key, item in value.items():
                if key in VALUE_KEYS and self._is_to_redact(item, sensitivity):
                    value[key] = REDACTED
                    alterations.count_redacted(name)

    def _redact_list(self, value: list[Any], alterations: Alterations) -> None:
        for item in value:
            kind = type(item)
            if kind is dict:
                self._redact_object(item, alterations)
            elif kind is list:
                if len(item) == _PAIR and type(item[0]) is str:
                    self._redact_pair(item, alterations)
                self._redact_list(item, alterations)

    def _redact_pair(self, pair: list[Any], alterations: Alterations) -> None:
        """Redact a pair such as `["authorization", "Bearer ..."]` in a list of headers."""
        name, item = pair
        if len(name) <= _MEMO_KEY_LENGTH and self._is_to_redact(item, self.sensitivity(name)):
            pair[1] = REDACTED
            alterations.count_redacted(name)

    @staticmethod
    def _is_to_redact(item: Any, sensitivity: Sensitivity) -> bool:
        return item != REDACTED and sensitivity >= _TEXT and _is_sensitive(item, sensitivity)


_ABOUT: Final = frozenset((word,) for word in ABOUT)
_HARMLESS_RUNS: Final = frozenset(map(words, HARMLESS_RUNS))


def _is_sensitive(value: Any, sensitivity: Sensitivity) -> bool:
    """Whether a decoded JSON value contains text (or numbers, if numbers are sensitive)."""
    kind = type(value)
    if kind is str:
        return True
    if kind is dict:
        return any(_is_sensitive(item, sensitivity) for item in value.values())
    if kind is list:
        return any(_is_sensitive(item, sensitivity) for item in value)
    return sensitivity is _NUMBERS and (kind is int or kind is float)
