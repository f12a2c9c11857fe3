"""Which files: the sealed segments of a spool, oldest first, and the dead writers' ones, sealed here.

A name says nothing before its file was looked at: only a regular file under a segment's name is touched,
links are not followed, and everything else is reported, never opened.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

from spool.segment import OPEN, SEALED, STEM, recover


@dataclass
class Scan:
    """What one look at a spool found. `skipped` maps a name to why it was not touched."""

    sealed: list[Path] = field(default_factory=list)
    adopted: list[Path] = field(default_factory=list)
    torn_bytes: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def scan(directory: Path) -> Scan:
    """Look at every entry once, sealed ones oldest first. Raises OSError for the directory itself."""
    found = Scan()
    with os.scandir(directory) as entries:
        for entry in entries:
            name = Path(entry.name)
            if name.suffix not in (OPEN, SEALED):
                continue
            if not STEM.fullmatch(name.stem):
                found.skipped[entry.name] = "its name is not a segment's"
            elif not _regular(entry):
                found.skipped[entry.name] = "it is not a regular file"
            elif name.suffix == SEALED:
                found.sealed.append(directory / name)
            else:
                _adopt(directory / name, found)
    found.sealed.sort()
    return found


def segment_names(directory: Path) -> list[str]:
    """Return the names of the segments, open and sealed. Raises OSError."""
    return [
        name
        for name in os.listdir(directory)
        if name.endswith((OPEN, SEALED)) and STEM.fullmatch(os.path.splitext(name)[0])
    ]


@dataclass(frozen=True)
class Backlog:
    """What waits in a spool. `lag_seconds` is the age of the oldest sealed segment, 0 where there is none."""

    open_segments: int
    sealed_files: int
    sealed_bytes: int
    lag_seconds: float


def backlog(directory: Path) -> Backlog:
    """Look at a spool, touching nothing. Raises OSError."""
    open_segments, sizes, oldest = 0, [], time.time()
    for name in segment_names(directory):
        open_segments += name.endswith(OPEN)
        if name.endswith(SEALED):
            with contextlib.suppress(FileNotFoundError):  # loaded meanwhile
                status = os.lstat(directory / name)
                sizes.append(status.st_size)
                oldest = min(oldest, status.st_mtime)
    lag = max(0.0, time.time() - oldest) if sizes else 0.0
    return Backlog(open_segments, len(sizes), sum(sizes), round(lag, 3))


def _regular(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _adopt(path: Path, found: Scan) -> None:
    """Seal a segment whose writer is dead; one whose writer lives is left alone."""
    try:
        sealed = recover(path)
    except FileNotFoundError:
        return  # its writer sealed it meanwhile
    except OSError as error:
        found.skipped[path.name] = str(error.strerror)
        return
    if sealed is not None:
        found.torn_bytes += sealed.torn_bytes
        if sealed.path is not None:
            found.adopted.append(sealed.path)
            found.sealed.append(sealed.path)
