"""Finds and removes the ids of erased people in bytes, by the 32 digits of an id in any spelling.

An id is found with or without hyphens between its digits, in upper or lower case, inside other text, and with JSON
escapes. Each run of digits and hyphens that is long enough is checked against a set, so that a thousand people
take as long as one: a regular expression with 100 alternatives took 304 s, with one alternative 2.1 s.

A line belongs to a person if `user_id`, `family_unit_id`, `event_id` or `id` is the id, or if the line contains the id
and is not a JSON object; it becomes `ERASED_LINE`. In all other lines the digits of the id become zeros. Both keep
the length of the line, so chunks, offsets and line numbers still match the ledger, and a replay counts every line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Final

import orjson

from loader.files.content import BOM

ERASED_LINE: Final = b'{"erased":true}'
"""The replacement of an erased line, padded with blanks. It has 15 bytes; a line with an id has at least 32."""
IDENTITY: Final = ("user_id", "family_unit_id", "event_id", "id")
"""The fields whose id makes a line belong to a person."""
OVERLAP: Final = 512
"""Bytes of the previous block that are searched again with the next one: longer than any escaped id."""
_DIGITS: Final = 32
_NOBODY: Final = b"0" * _DIGITS
"""Replaces a mention. No person can be erased by this id."""
_RUN: Final = re.compile(rb"[0-9a-fA-F][0-9a-fA-F-]{30,}[0-9a-fA-F]")
_HEXADECIMAL: Final = b"0123456789abcdefABCDEF"
_DIGITS_ALONE: Final = bytes(
    ord(chr(byte).lower()) if byte in _HEXADECIMAL else ord(" ") for byte in range(256)
)
"""Maps hexadecimal digits to lower case, and every other byte to a blank."""
_DIGIT: Final = re.compile(rb"[0-9a-fA-F]")
_ESCAPED: Final = re.compile(rb"(?<!\\)((?:\\\\)*)\\u00(3[0-9]|[46][1-6]|2[dD])")
"""An escaped digit or hyphen. The emitter never writes one."""
_MEMO: Final = 1 << 17
"""Number of runs without an id after which their memo is cleared; about 15 MiB."""
_ZEROS: Final = bytes.maketrans(b"123456789abcdefABCDEF", b"0" * 21)


class Mentions:
    """Finds the ids of the given people. Thread-safe: losing an entry of the memo only costs time.

    `ids` are plain ids. `subjects` are hashes, sha256(key || id) with one of the `keys`.
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
        """Whether any of the ids is in a text without JSON escapes."""
        return self._found_in(text.encode("utf-8", "surrogatepass"))

    def applied(self, line: bytes) -> bytes | None:
        """Return a line (without its newline) unchanged or with ids zeroed, or None if it has to be erased."""
        if not self.concern(line):
            return line
        text = _unescaped(line)
        if self._is_somebodys(text.removeprefix(BOM)):
            return None
        return self.redacted(text).ljust(len(line))

    def redacted(self, data: bytes) -> bytes:
        """Return the data with the digits of the ids replaced by zeros."""
        kept = bytearray(data)
        for begin, end in self.spans(data):
            kept[begin:end] = data[begin:end].translate(_ZEROS)
        return bytes(kept)

    def spans(self, data: bytes | bytearray) -> Iterator[tuple[int, int]]:
        """Yield the start and end of each id."""
        for run in _RUN.finditer(data):
            digits = run[0].replace(b"-", b"").lower()
            if not self._is_in(digits):
                continue
            places = [digit.start() for digit in _DIGIT.finditer(run[0])]
            for place in range(len(digits) - _DIGITS + 1):
                if self._has(digits[place : place + _DIGITS]):
                    yield run.start() + places[place], run.start() + places[place + _DIGITS - 1] + 1

    def ids_in(self, data: bytes) -> Iterator[bytes]:
        """Yield the ids in the data, as 16 bytes each."""
        for begin, end in self.spans(data):
            yield bytes.fromhex(data[begin:end].replace(b"-", b"").decode())

    def _found_in(self, data: bytes | bytearray) -> bool:
        # For a chunk of 8,000 events: 45 ms for the runs and 55 ms for the hashes of those not in the memo. A
        # regular expression with a call for each run took 200 ms (Python 3.11).
        runs = set(bytes(data.translate(_DIGITS_ALONE, b"-")).split()) - self._clean
        if any(self._is_in(run) for run in runs if len(run) >= _DIGITS):
            return True
        if len(self._clean) >= _MEMO:
            self._clean.clear()
        self._clean |= runs
        return False

    def _is_in(self, run: bytes) -> bool:
        """Whether a run of digits contains any of the ids."""
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
    """The current mentions, for code that retires or archives files. `mentions` is replaced, never modified."""

    def __init__(self) -> None:
        self.mentions = NOBODY


def erased_line(length: int) -> bytes:
    """Return an erased line of the given length in bytes."""
    return ERASED_LINE.ljust(length)


def is_erased(line: bytes) -> bool:
    """Whether a line is an erased one."""
    return line.strip() == ERASED_LINE


def _unescaped(data: bytes) -> bytes:
    """Return equivalent JSON in which no digit or hyphen is escaped."""
    return _ESCAPED.sub(lambda found: found[1] + bytes.fromhex(found[2].decode()), data)
