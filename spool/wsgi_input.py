"""Watches the body of a WSGI request for a client that disconnects during an upload.

WSGI does not signal this: the application reads fewer bytes than Content-Length announced, or gets an
OSError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class WatchedInput:
    """A wrapper of the server's input. Attributes not related to reading are those of the server's object."""

    def __init__(self, stream: Any, length: int) -> None:
        self._stream = stream
        self._left = length
        self._ended = False

    def is_cut_off(self) -> bool:
        """Whether the input ended before the announced length."""
        return self._ended and self._left > 0

    def read(self, size: int | None = -1, *more: Any) -> bytes:
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        return self._count(self._call("read", *(() if size is None else (size, *more))), wanted)

    def readline(self, *limit: Any) -> bytes:
        return self._count(self._call("readline", *limit), 1)

    def readlines(self, *hint: Any) -> list[bytes]:
        lines = [self._count(line, 1) for line in self._call("readlines", *hint)]
        self._ended = self._ended or not hint
        return lines

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._stream, name)(*arguments)
        except OSError:
            self._ended = True
            raise

    def _count(self, data: bytes, wanted: int) -> bytes:
        self._left -= len(data)
        self._ended = self._ended or len(data) < wanted
        return data


def watched(stream: Any, environ: Mapping[str, Any]) -> WatchedInput | None:
    """Return the watched input of a request, or None if the request has no body of a known length."""
    length = environ.get("CONTENT_LENGTH")
    if stream is None or not length or length == "0" or not length.isdigit():
        return None
    return WatchedInput(stream, int(length))
