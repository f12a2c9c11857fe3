"""Writes a file that gets its name only once it is complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

_MODE: Final = 0o640
"""Personal data: readable by owner and group only."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that replaces `path` at the end; after an error `path` is unchanged.

    A `path` that is not a regular file, such as a pipe or /dev/stdout, is written directly. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as direct:
            yield direct
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), _MODE)
            Path(file.name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
