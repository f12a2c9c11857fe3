"""Checks once, when an emitter is created, whether the spool directory is usable. Creates nothing."""

from __future__ import annotations

import os
from pathlib import Path

from spool import kernel
from spool.log import logger
from spool.settings import Settings


class DirectoryError(ValueError):
    """The spool directory, or a file in it, cannot be created."""


def check_directory(settings: Settings) -> None:
    """Log one warning if the directory cannot be used now; raise `DirectoryError` in strict mode instead.

    The emitter keeps retrying and counts what it drops: the file system may be mounted later.
    """
    if not kernel.SUPPORTED or (problem := problem_of(settings.directory)) is None:
        return
    remedy = "set SPOOL_DIR to a directory that this process may write"
    message = f'cannot write to the spool "{settings.directory}": {problem}; {remedy}'
    if settings.strict:
        raise DirectoryError(message)
    logger().warning("%s", message)


def problem_of(directory: Path) -> str | None:
    """Return why no file can be created in the directory, which may not exist yet, or None if it can."""
    nearest = directory
    try:
        while not nearest.exists():
            nearest = nearest.parent
    except OSError as error:
        return f"{error.strerror}"
    if not nearest.is_dir():
        return f'"{nearest}" is not a directory'
    if not os.access(nearest, os.W_OK | os.X_OK):
        missing = "" if nearest == directory else ", so it cannot be created"
        return f'no permission to write in "{nearest}"{missing}'
    return None
