"""Loads files named by the user: any path, name and compression. The files are never modified."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Final

from loader.errors import UsageError
from loader.files import nofollow, rejects
from loader.files.chunk import Chunk, Reading, chunks
from loader.files.content import UNREADABLE, DamagedError, lines_of
from loader.files.erase import STATE
from loader.files.lock import LOCK
from loader.load.batch import check
from loader.load.counts import Loaded
from spool.segment import OPEN

STDIN: Final = "-"

Wrap = Callable[[BinaryIO], BinaryIO]
"""Wraps the stream of a file that is being read, for a progress bar."""


class GivenFile:
    """A file named by the user, or standard input. A file `found` in a directory must not be a link.

    `again` also loads chunks that are in the ledger; `keep_expired` also lines below the low-water mark.
    """

    def __init__(
        self, path: str, *, found: bool = False, again: bool = False, keep_expired: bool = False
    ) -> None:
        self._path = None if path == STDIN else Path(path)
        self._found = found
        self._reading = Reading(again=again, keep_expired=keep_expired)
        # A path may contain any bytes.
        self.name = path.encode("utf-8", "backslashreplace").decode() if self._path else "stdin"
        self.wrap: Wrap = lambda stream: stream
        self.prepare: Callable[[Iterable[bytes]], None] = lambda _: None
        """Called with the lines of each chunk before it is loaded."""

    def size(self) -> int:
        """Return its size on disk in bytes; 0 for standard input. Raises OSError."""
        return os.stat(self._path, follow_symlinks=not self._found).st_size if self._path else 0

    def chunks(self, progressed: Callable[[], None] = lambda: None) -> Iterator[Chunk]:
        """Yield its chunks. Raises UNREADABLE, after the complete lines before the error."""
        with self.wrap(self._open()) as stream:
            lines = lines_of(stream, self.name)
            for chunk in chunks(lines, self.name, reading=replace(self._reading, progressed=progressed)):
                self.prepare(chunk.lines())
                yield chunk

    def _open(self) -> BinaryIO:
        if self._path is None:
            return sys.stdin.buffer
        return nofollow.open_file(self._path) if self._found else self._path.open("rb")

    def retire(self, *, oversize: bool) -> None:
        """Do nothing: the file is kept."""

    def postpone(self) -> None:
        """Do nothing: the report lists the file."""


@dataclass
class Found:
    """The files to load, and the skipped entries of directories with the reason."""

    files: list[GivenFile] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass
class DryRun:
    """The expected result of loading some files, as far as it is known without the database."""

    loaded: Loaded = field(default_factory=Loaded)
    codes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)


def find(names: Iterable[str], *, again: bool = False, keep_expired: bool = False) -> Found:
    """Return the named files and those in directories, for each directory oldest first.

    Raises UsageError for a path that does not exist or cannot be loaded.
    """
    found = Found()
    for given in names:
        path = Path(given)
        if given != STDIN and path.is_dir():
            _add_directory(given, found, again=again, keep_expired=keep_expired)
        elif given != STDIN and not path.exists():
            raise UsageError(f"{given} does not exist")
        elif path.suffix == OPEN:
            raise UsageError(
                f"{given} is an open segment: move it into a spool, where `loader run --once` seals it"
            )
        else:
            found.files.append(GivenFile(given, again=again, keep_expired=keep_expired))
    return found


def _add_directory(given: str, found: Found, *, again: bool, keep_expired: bool) -> None:
    """Add every file below a directory, and record all other entries."""
    files: list[str] = []
    for parent, below, names in os.walk(given):  # a link to a file is refused when it is opened
        for name in list(below):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                found.skipped[path] = "a link"
            elif name == rejects.DIRECTORY:
                found.skipped[path] = "it contains rejects: see `loader rejects retry`"
                below.remove(name)
        for name in names:
            path = os.path.join(parent, name)
            if (reason := _why_skipped(name)) is None:
                files.append(path)
            elif reason:
                found.skipped[path] = reason
    if not files and not found.skipped:
        raise UsageError(f"{given} contains no file")
    found.files += [
        GivenFile(path, found=True, again=again, keep_expired=keep_expired) for path in sorted(files)
    ]


def _why_skipped(name: str) -> str | None:
    """Return why an entry is skipped ("" if it is one of the loader's own files), or None if it is read."""
    if name in (LOCK, STATE):
        return ""
    if name.endswith(OPEN):
        return "an open segment: in a spool, `loader run` seals it"
    if name.endswith(".part"):
        return "an unfinished copy"
    return None


def dry_run(files: Iterable[GivenFile]) -> DryRun:
    """Decode every line and count, without a database."""
    result = DryRun()
    for file in files:
        try:
            for chunk in file.chunks():
                outcome = check(chunk)
                result.loaded += outcome.loaded()
                result.codes.update(reject.code for reject in outcome.rejects)
        except DamagedError as error:
            result.failures[file.name] = f"could not be read to its end: {error}"
        except UNREADABLE as error:
            result.failures[file.name] = f"could not be read: {error}"
    return result
