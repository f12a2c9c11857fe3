"""What may not leave the process: values under keys that name secrets or personal data.

A key is compared without case, `-`, `_` and blanks, and is sensitive when it contains one of the listed
words (`X-Api-Key`, `user_password` and `passwordHash` all are). Its whole value, of whatever type, becomes
`"[redacted]"`. Values under other keys are never looked at for secrets.

An application uses the same few keys again and again, so those that were found harmless are kept in a set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

REDACTED: Final = "[redacted]"
SENSITIVE_KEYS: Final = frozenset(
    {
        "password", "passwd", "passphrase", "secret", "token", "authorization", "apikey", "accesskey",
        "privatekey", "credential", "cookie", "csrf", "jwt", "bearer", "ssn", "socialsecurity",
        "creditcard", "cardnumber", "cvv", "cvc", "iban", "passport",
    }
)  # fmt: skip

CONTEXT_KEYS: Final = frozenset({"role", "request_id"})
"""The keys that a bound context adds to the metadata of events (spool/context.py)."""

_MEMO_SIZE: Final = 4096
_MEMO_KEY_LENGTH: Final = 128
"""Longer keys are checked each time: clients may choose them, and a full memo must stay below 3 MiB."""
_SEPARATORS: Final = str.maketrans("", "", "-_ .")


def _normal(key: str) -> str:
    return key.translate(_SEPARATORS).casefold()


class Redaction:
    """A list of sensitive words, ready to be asked. Safe to share between threads."""

    def __init__(self, words: Iterable[str] = SENSITIVE_KEYS) -> None:
        self.words = frozenset(filter(None, map(_normal, words)))
        self.spares_context = not any(map(self._contains_word, CONTEXT_KEYS))
        """Whether the keys that a bound context adds to metadata are not sensitive."""
        self.harmless: set[object] = set()
        """Keys that were asked about recently and are not sensitive."""

        self.harmless_beside_context: set[object] = set()
        """The same without those that a bound context adds to an event's metadata."""

    def sensitive(self, key: str) -> bool:
        """Whether the value under `key`, an exact `str`, must not be written."""
        if key in self.harmless:
            return False
        if self._contains_word(key):
            return True
        if len(key) <= _MEMO_KEY_LENGTH:
            if len(self.harmless) >= _MEMO_SIZE:
                self.harmless.clear()
                self.harmless_beside_context.clear()
            self.harmless.add(key)
            if key not in CONTEXT_KEYS:
                self.harmless_beside_context.add(key)
        return False

    def _contains_word(self, key: str) -> bool:
        normal = _normal(key)
        return any(word in normal for word in self.words)

    def apply(self, value: Any) -> Any:
        """Return decoded JSON with every sensitive value replaced; `value` itself if there is none."""
        if isinstance(value, dict):
            changed = {
                key: REDACTED if self.sensitive(key) else self.apply(item) for key, item in value.items()
            }
            return changed if any(changed[key] is not value[key] for key in value) else value
        if isinstance(value, list):
            items = [self.apply(item) for item in value]
            return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
        return value
