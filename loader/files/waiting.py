"""Rejects that wait for their parent row: foreign key violations of the last hour."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from loader.files import rejects

CODE: Final = "postgres_23503"
"""The reject code for foreign_key_violation."""
RETRIED_SECONDS: Final = 3600.0


def waiting(spool: Path, seen: dict[str, tuple[int, int]]) -> Iterator[tuple[Path, float, int]]:
    """Yield each file to be retried, when it was written, and how many of its rejects wait for a parent.

    `seen` caches results, so that each version of a file is read only once. Raises OSError.
    """
    begun = time.time() - RETRIED_SECONDS
    paths = rejects.files(spool)
    for name in seen.keys() - {path.name for path in paths}:
        del seen[name]
    for path in paths:
        try:
            status = path.lstat()
            if status.st_mtime < begun:
                continue
            version, count = seen.get(path.name, (0, 0))
            if version != status.st_mtime_ns:
                count = rejects.count([path])[CODE]
                seen[path.name] = status.st_mtime_ns, count
        except (FileNotFoundError, ValueError):  # retried in the meantime, or not a reject file
            continue
        if count:
            yield path, status.st_mtime, count
