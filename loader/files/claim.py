"""A reject file is retried by one process at a time: an flock on the file itself (flock(2)).

The kernel frees it with the process. Whoever retries a file replaces or removes it, so a lock counts only if
the path still names the locked file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loader.files import nofollow


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Yield whether the file is ours for the block.

    False for one that another process retries, or that is gone. Raises OSError.
    """
    try:
        stream = nofollow.open_file(path)
    except FileNotFoundError:
        yield False
        return
    with stream:
        yield _is_locked(stream.fileno(), path)


def _is_locked(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
