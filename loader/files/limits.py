"""How much of a file is loaded at once; apart, because reading rejects needs no decompressor."""

from __future__ import annotations

from typing import Final

CHUNK_BYTES: Final = 4 << 20
"""Some 10,000 events, a quarter of a second of a server's work: a transaction's fixed cost is nothing beside
that. A worker needs a few times this in memory."""
CHUNK_LINES: Final = 1 << 16
"""Twice what a chunk of events has: each line of a chunk may become a reject, some 600 bytes of memory."""
