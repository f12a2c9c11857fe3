"""Files loaded by hand: from anywhere, compressed or not, and never changed."""

from __future__ import annotations

import gzip
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, cast

import zstandard

from loader.errors import UsageError
from loader.files import nofollow, rejects
from loader.files.chunk import chunks
from loader.load.batch import check
from loader.load.counts import Loaded
from loader.service.run import UNREADABLE
from spool.segment import OPEN

STDIN: Final = "-"
_SUFFIXES: Final = (".ndjson", ".ndjson.gz", ".ndjson.zst")

Wrap = Callable[[BinaryIO], BinaryIO]
"""Put around the bytes of a file as they are read, for a progress bar."""


class GivenFile:
    """A file someone named, or standard input; one that was `found` in a directory may be no link."""

    def __init__(self, path: str, *, found: bool = False) -> None:
        self._path = None if path == STDIN else Path(path)
        self._found = found
        # A path may hold any bytes.
        self.name = path.encode("utf-8", "backslashreplace").decode() if self._path else "stdin"
        self.wrap: Wrap = lambda stream: stream

    def size(self) -> int:
        """Return its bytes as they are on disk; 0 for standard input. Raises OSError."""
        return os.stat(self._path, follow_symlinks=not self._found).st_size if self._path else 0

    def open(self) -> BinaryIO:
        stream = self.wrap(self._open())
        if self.name.endswith(".gz"):
            return cast(BinaryIO, gzip.open(stream))
        if self.name.endswith(".zst"):
            reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
            return io.BufferedReader(cast(io.RawIOBase, reader))
        return stream

    def _open(self) -> BinaryIO:
        if self._path is None:
            return sys.stdin.buffer
        return nofollow.open_file(self._path) if self._found else self._path.open("rb")

    def retire(self, *, oversize: bool) -> None:
        """Leave the file as it is."""


@dataclass
class DryRun:
    """What loading some files would do, as far as it can be known without the database."""

    loaded: Loaded = field(default_factory=Loaded)
    codes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)


def find(names: Iterable[str]) -> list[GivenFile]:
    """Return the files that are named, and those in directories, each directory's oldest first.

    Raises UsageError for what is not there and for what can't be loaded.
    """
    return [file for given in names for file in _expand(given)]


def _expand(given: str) -> Iterator[GivenFile]:
    path = Path(given)
    if given == STDIN:
        yield GivenFile(given)
    elif path.is_dir():
        found = sorted(_files_in(path))
        if not found:
            raise UsageError(f"{given} has no file that ends in {', '.join(_SUFFIXES)}")
        yield from (GivenFile(name, found=True) for name in found)
    elif not path.exists():
        raise UsageError(f"{given} does not exist")
    elif path.suffix == OPEN:
        raise UsageError(
            f"{given} is an open segment: put it into a spool, where `loader run --once` seals it"
        )
    else:
        yield GivenFile(given)


def _files_in(directory: Path) -> Iterator[str]:
    """Every file to load below a directory, except a spool's rejects."""
    for parent, below, names in os.walk(directory):
        below[:] = [name for name in below if name != rejects.DIRECTORY]
        yield from (os.path.join(parent, name) for name in names if name.endswith(_SUFFIXES))


def dry_run(files: Iterable[GivenFile]) -> DryRun:
    """Decode every line and count, without a database."""
    result = DryRun()
    for file in files:
        try:
            with file.open() as stream:
                for chunk in chunks(stream, file.name):
                    outcome = check(chunk)
                    result.loaded += outcome.loaded()
                    result.codes.update(reject.code for reject in outcome.rejects)
        except UNREADABLE as error:
            result.failures[file.name] = f"could not be read: {error}"
    return result
