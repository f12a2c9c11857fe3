"""Limits of a chunk. A separate module, because reading rejects needs no decompressor."""

from __future__ import annotations

from typing import Final

CHUNK_BYTES: Final = 4 << 20
"""About 10,000 events, a quarter of a second of server time: the fixed cost of a transaction is negligible in
comparison. A worker needs a few times this in memory."""
CHUNK_LINES: Final = 1 << 16
"""Twice the lines in a chunk of events. Each line of a chunk may become a reject of about 600 bytes in memory."""
