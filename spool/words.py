"""Splits a key into words: at separators, between letters and digits, and in camelCase.

    X-Api-Key          x api key
    passwordHash2      password hash 2
    APIKey             api key
    pass<U+200B>word   password      (a zero-width space, which is invisible)

Compatibility forms (full-width letters, ligatures) are normalized first (NFKC, Unicode Standard Annex #15).
Invisible characters are removed: control characters, and Default_Ignorable_Code_Point of
https://www.unicode.org/Public/UCD/latest/ucd/DerivedCoreProperties.txt. U+FFFD, which replaces NUL
characters, is removed as well. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffd\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_UPPER: Final = "A-Z\xc0-\xd6\xd8-\xde"
_LOWER: Final = "a-z\xdf-\xf6\xf8-\xff"
_WORD: Final = re.compile(rf"[{_UPPER}]+(?![{_LOWER}])|[{_UPPER}]?[{_LOWER}]+|\d+|[^\W\d_{_UPPER}{_LOWER}]+")


def words(key: str) -> tuple[str, ...]:
    """Return the words of a key, case-folded.

    >>> words("userAPIKey_v2")
    ('user', 'api', 'key', 'v', '2')
    """
    if not (key.isascii() and key.isprintable()):
        key = _INVISIBLE.sub("", unicodedata.normalize("NFKC", key))
    return tuple(word.casefold() for word in _WORD.findall(key))
