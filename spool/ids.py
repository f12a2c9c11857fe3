"""UUIDv7 without a system call (RFC 9562, section 5.7, with the counter of section 6.2, method 2).

    0190163d-8694-7  39b-aea5  -966c26f8ad91
    milliseconds     random    counter, started at random
    of the clock     per process

Ids of one process rise strictly within a millisecond, so index inserts stay local. Two processes can only
meet in the same millisecond with the same 26 random bits and overlapping 48-bit counters. `os.urandom` is
asked once per process, never per id: it releases the GIL, and with busy threads beside it getting the GIL
back costs tens of milliseconds. A forked child draws anew, before any other code of it runs.
"""

from __future__ import annotations

import itertools
import os

_COUNTER_BITS = 47  # of 48: the top bit stays clear, so that counting up never overflows 12 digits

head = ""
"""`-7rrr-Vrrr-`: version, variant and this process' random bits."""
counter = itertools.count()
"""The last 12 digits of the next id; `next()` on it is atomic."""


def _reseed() -> None:
    global head, counter
    bits = int.from_bytes(os.urandom(10))
    head = f"-7{bits & 0xFFF:03x}-{0x8000 | bits >> 12 & 0x3FFF:04x}-"
    counter = itertools.count(bits >> 26 & ((1 << _COUNTER_BITS) - 1))


_reseed()
os.register_at_fork(after_in_child=_reseed)


def prefix(milliseconds: int) -> str:
    """Return all but the last 12 digits of an id made at `milliseconds` since 1970 in this process."""
    digits = f"{milliseconds:012x}"
    return f"{digits[:8]}-{digits[8:]}{head}"


def uuid7(milliseconds: int) -> str:
    """Return a new UUIDv7 as text, made at `milliseconds` since 1970."""
    return f"{prefix(milliseconds)}{next(counter):012x}"
