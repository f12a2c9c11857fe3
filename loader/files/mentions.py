"""Finds and removes the ids of erased people in bytes, by the 32 digits of an id in any spelling.

An id counts with any hyphens between its digits or none, in any case, inside other text, and escaped as JSON
allows it. Each run of digits and hyphens that may hold one is looked up in a set, so that a thousand people
take as long as one: a regular expression of 100 alternatives took 304 s for what one took 2.1 s.

A line is that of somebody if `user_id`, `family_unit_id`, `event_id` or `id` has the id, or if it is not a JSON object;
it becomes `ERASED_LINE`. In every other line the digits of the id become zeros. Both keep the length of the
line: chunks, offsets and numbers of lines stay what the ledger knows, and each line is counted again at a replay.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Final

import orjson

from loader.files.content import BOM

ERASED_LINE: Final = b'{"erased":true}'
"""Replaces an erased line and is padded with blanks. It has 15 bytes; a line with an id has at least 32."""
IDENTITY: Final = ("user_id", "family_unit_id", "event_id", "id")
"""The fields that make a line somebody's."""
OVERLAP: Final = 512
"""Bytes of the block before that a search of the next one begins with: more than an escaped id has."""
_DIGITS: Final = 32
_NOBODY: Final = b"0" * _DIGITS
"""Replaces a mention. No person can be erased by this id."""
_RUN: Final = re.compile(rb"[0-9a-fA-F][0-9a-fA-F-]{30,}[0-9a-fA-F]")
_HEXADECIMAL: Final = b"0123456789abcdefABCDEF"
_DIGITS_ALONE: Final = bytes(
    ord(chr(byte).lower()) if byte in _HEXADECIMAL else ord(" ") for byte in range(256)
)
"""Makes everything but digits a blank."""
_DIGIT: Final = re.compile(rb"[0-9a-fA-F]")
_ESCAPED: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u00(3[0-9]|[46][1-6]|2[dD])")
"""A digit or a hyphen that is escaped, which the emitter never does."""
_MEMO: Final = 1 << 17
"""Runs after which the memo of those that concern nobody is cleared; some 15 MiB."""
_ZEROS: Final = bytes.maketrans(b"123456789abcdefABCDEF", b"0" * 21)


class Mentions:
    """Finds the ids of some people. Safe to use from any thread: a memo that is lost costs nothing.

    `ids` are known; of `subjects` only sha256(key || id) is, under one of the `keys`.
    """

    def __init__(
        self, ids: Iterable[bytes] = (), keys: Iterable[bytes] = (), subjects: Iterable[bytes] = ()
    ) -> None:
        self._ids = frozenset(each.hex().encode() for each in ids) - {_NOBODY}
        self._keys = tuple(keys)
        self._subjects = frozenset(subjects)
        self._clean: set[bytes] = set()

    def __bool__(self) -> bool:
        return bool(self._ids or self._subjects)

    def concern(self, data: bytes | bytearray) -> bool:
        """Whether any of the ids is in the data."""
        return self._found_in(data) or (b"\\u00" in data and self._found_in(_unescaped(bytes(data))))

    def in_text(self, text: str) -> bool:
        """Whether any of the ids is in a text that has no escapes."""
        return self._found_in(text.encode("utf-8", "surrogatepass"))

    def applied(self, line: bytes) -> bytes | None:
        """Return a line, without its newline, as it may be kept: unchanged, with zeros, or None if it is erased."""
        if not self.concern(line):
            return line
        text = _unescaped(line)
        if self._is_somebodys(text.removeprefix(BOM)):
            return None
        return self.redacted(text).ljust(len(line))

    def redacted(self, data: bytes) -> bytes:
        """Return the data with zeros in the place of the ids' digits."""
        kept = bytearray(data)
        for begin, end in self.spans(data):
            kept[begin:end] = data[begin:end].translate(_ZEROS)
        return bytes(kept)

    def spans(self, data: bytes | bytearray) -> Iterator[tuple[int, int]]:
        """Yield where ids begin and end."""
        for run in _RUN.finditer(data):
            digits = run[0].replace(b"-", b"").lower()
            if not self._is_in(digits):
                continue
            places = [digit.start() for digit in _DIGIT.finditer(run[0])]
            for place in range(len(digits) - _DIGITS + 1):
                if self._has(digits[place : place + _DIGITS]):
                    yield run.start() + places[place], run.start() + places[place + _DIGITS - 1] + 1

    def ids_in(self, data: bytes) -> Iterator[bytes]:
        """Yield the ids that are in the data, as 16 bytes each."""
        for begin, end in self.spans(data):
            yield bytes.fromhex(data[begin:end].replace(b"-", b"").decode())

    def _found_in(self, data: bytes | bytearray) -> bool:
        # Of a chunk of 8,000 events: 45 ms for the runs and 55 ms for hashes of what is not in the memo, where a
        # regular expression and a call for each run took 200 ms (Python 3.11).
        runs = set(bytes(data.translate(_DIGITS_ALONE, b"-")).split()) - self._clean
        if any(self._is_in(run) for run in runs if len(run) >= _DIGITS):
            return True
        if len(self._clean) >= _MEMO:
            self._clean.clear()
        self._clean |= runs
        return False

    def _is_in(self, run: bytes) -> bool:
        """Whether any of the ids is in a run of digits."""
        if len(run) == _DIGITS:
            return self._has(run)
        return any(self._has(run[place : place + _DIGITS]) for place in range(len(run) - _DIGITS + 1))

    def _has(self, digits: bytes) -> bool:
        if digits in self._ids:
            return True
        if not self._subjects or digits == _NOBODY:
            return False
        unkeyed = bytes.fromhex(digits.decode())
        for key in self._keys:  # noqa: SIM110  # a generator takes as long as the hash
            if hashlib.sha256(key + unkeyed).digest() in self._subjects:
                return True
        return False

    def _is_somebodys(self, line: bytes) -> bool:
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            return True
        if not isinstance(fields, dict):
            return True
        values = (fields.get(name) for name in IDENTITY)
        return any(isinstance(value, str) and self.in_text(value) for value in values)


NOBODY: Final = Mentions()


class Latest:
    """The current mentions, for code that keeps files. `mentions` is replaced, never modified."""

    def __init__(self) -> None:
        self.mentions = NOBODY


def erased_line(length: int) -> bytes:
    """Return what is kept of a line of this length."""
    return ERASED_LINE.ljust(length)


def is_erased(line: bytes) -> bool:
    """Whether this is what was kept of a line."""
    return line.strip() == ERASED_LINE


def _unescaped(data: bytes) -> bytes:
    """Return JSON in which no digit and no hyphen is escaped; it means the same."""
    return _ESCAPED.sub(lambda found: found[1] + bytes.fromhex(found[2].decode()), data)
