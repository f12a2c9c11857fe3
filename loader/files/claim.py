"""Lets one process at a time retry a reject file, by an flock on the file itself (flock(2)).

The kernel frees the lock when the process exits. A retry replaces or removes the file, so a lock counts only
if the path still names the locked file.
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
    """Lock the file for the block, and yield whether that succeeded.

    Yields False if another process retries the file or if it no longer exists. Raises OSError.
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
