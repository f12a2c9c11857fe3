"""Chunks are whole lines, in order and complete, whatever the bytes."""

from __future__ import annotations

import hashlib
import io

from hypothesis import given
from hypothesis import strategies as st

from loader.files.chunk import HEAD_BYTES, chunks

lines = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")))


@given(lines, st.booleans(), st.integers(1, 64), st.integers(1, 8))
def test_chunks_cover_every_byte_and_number_every_line(
    content: list[bytes], newline_at_end: bool, limit: int, most: int
) -> None:
    data = b"\n".join(content) + (b"\n" if newline_at_end else b"")
    offset = 0
    for chunk in chunks(io.BytesIO(data), "f", limit, most):
        there = data[offset : offset + chunk.size]
        assert chunk.offset == offset and chunk.size > 0
        is_counted = chunk.oversize and bytes(limit) in there  # so that a hole takes no time
        assert is_counted or chunk.digest == hashlib.sha256(there).digest()
        assert chunk.first_line == data[:offset].count(b"\n") + 1
        if chunk.oversize:
            assert there.removesuffix(b"\n").count(b"\n") == 0 and len(there) >= limit
            assert len(list(chunk.lines())) == 1 and len(chunk.data) <= HEAD_BYTES
        else:
            assert len(there) <= limit and chunk.data == there
            count = there.count(b"\n") + (not there.endswith(b"\n"))
            assert len(list(chunk.lines())) == chunk.line_count == count <= most + (count == most + 1)
        offset += chunk.size
    assert offset == len(data)


def test_a_line_longer_than_a_chunk_is_one_chunk_with_its_head_only() -> None:
    found = list(chunks(io.BytesIO(b"a\n" + b"x" * 5_000_000 + b"\nb\n"), "f", 4096))
    assert [(chunk.size, chunk.oversize) for chunk in found] == [(2, False), (5_000_001, True), (2, False)]
