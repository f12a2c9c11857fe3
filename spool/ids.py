"""UUIDv7 without a system call (RFC 9562, section 5.7, with the counter of section 6.2, method 2).

    0190163d-8694-7  39b-aea5  -966c26f8ad91
    milliseconds     random    counter, random start
    since 1970       per process

Ids of one process increase strictly within a millisecond, so index inserts stay local. Two processes can only
generate the same id in the same millisecond with the same 26 random bits and overlapping counters.
`os.urandom` is called once per process, never per id: it releases the GIL, and with other busy threads
getting it back takes tens of milliseconds. A forked child draws new random bits before its first id
(spool/fork.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, count, repeat
from operator import attrgetter
from typing import Final

from spool import fork

_START_BITS: Final = 35  # of 36 bits: the top bit stays clear, so that counting never overflows 9 digits
_LOW_DIGITS: Final = tuple(f"{low:03x}" for low in range(4096))

head = ""
"""`-7rrr-Vrrr-`: version, variant and the random bits of this process."""
tails: Iterator[str] = iter(())
"""Yields the last 12 digits of the next ids."""


def _counting_up(start: int) -> Iterator[str]:
    """Return the texts of `start` followed by 000 to fff, then of `start + 1`, and so on.

    Joining two ready texts takes a sixth of the time of formatting a number. Only iterators written in C are
    combined here, so `next` runs no Python code that a thread or a signal handler could interrupt.
    """
    starts = map("%09x".__mod__, count(start))
    return chain.from_iterable(map(map, map(attrgetter("__add__"), starts), repeat(_LOW_DIGITS)))


def _reseed() -> None:
    global head, tails
    bits = int.from_bytes(os.urandom(8))
    head = f"-7{bits & 0xFFF:03x}-{0x8000 | bits >> 12 & 0x3FFF:04x}-"
    tails = _counting_up(bits >> 26 & ((1 << _START_BITS) - 1))


_reseed()
fork.in_child(_reseed)


def prefix(milliseconds: int) -> str:
    """Return an id of this process without its last 12 digits, for `milliseconds` since 1970."""
    digits = f"{milliseconds:012x}"
    return f"{digits[:8]}-{digits[8:]}{head}"


def uuid7(milliseconds: int) -> str:
    """Return a new UUIDv7 as text, for `milliseconds` since 1970."""
    if not fork.NOTICED:
        fork.notice()
    return prefix(milliseconds) + next(tails)
