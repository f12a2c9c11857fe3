"""Suggestions for misspelled names in messages."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return `; did you mean "name"?` if a known name is similar to the given one, otherwise an empty string.

    >>> did_you_mean("memory_postd", ["memory_posted", "feed_viewed"])
    '; did you mean "memory_posted"?'
    """
    from difflib import get_close_matches  # needed only for errors

    similar = get_close_matches(str(given), list(known), n=1)
    return f'; did you mean "{similar[0]}"?' if similar else ""
