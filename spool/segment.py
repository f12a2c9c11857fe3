"""A segment: one file of lines, written by one process; its name shows its state.

    <stem>.open     preallocated and being written; its writer holds an exclusive flock on it
    <stem>.ndjson   sealed: cut to its last complete line, immutable

    <stem> = 20261123T120000.000000Z-host-boot-pid-random-000001

Nothing here parses JSON: a segment is lines that end in a newline and have no NUL byte.

The state that a crash (SIGKILL, or power loss with `fsync`) leaves after each step, and what repairs it:

    step                               leaves                                  repaired by
    create    1 open <stem>.new        an empty file that loaders ignore       an emitter that measures the
              2 lock it                                                        spool removes it after a minute
              3 reserve, map           the same, with its capacity             (`written_bytes`)
              4 rename to .open        a locked file of NUL bytes              adopt: no line, so it is removed
    append    copy into the map        every line whose emit returned; the     adopt: cut to the last whole line,
                                       last one may be cut, or have a hole     `torn_bytes` reports the rest
    rotate    1 the spare takes lines  two files with lines                    adopt, each
              2 the full one retires
    resize    1 reserve or cut         a file without lines, of another size   adopt: it is removed
              2 map again
    seal      1 cut to its lines       a shorter .open                         adopt: seals it
              2 sync the file          the same, durable                       adopt
              3 rename to .ndjson      sealed                                  nothing to do
              4 sync the directory     sealed; before it, power loss may       adopt
                                       bring .open back
    seal by   1 write <stem>.part      both; loaders ignore .part              adopt: writes .part again
    copying   2 sync, rename it        .ndjson beside .open                    adopt waits until .ndjson is loaded;
                                                                               then its lines are known
              3 remove .open           sealed                                  nothing to do
    adopt       lock, then as seal     the lock is free again                  the next loader

A running writer repairs its own segments: it repeats a failed step (`seal`), rewrites a removed file, and
releases the lock of a file that it may no longer rename, so that the loader seals it.

Nothing repairs a file that another process truncates while it is open (`: > file`, logrotate with
`copytruncate`). Its lines are gone, and the next emit of the process kills it by SIGBUS. Linux has no seal,
lease or lock that prevents this for a file in a directory, and a SIGBUS handler would have to replace the
application's. The mode 0640 excludes other users; with `SPOOL_MAPPED=0` the process survives, at the latency
of a write(2): tens of milliseconds at p99 with other busy threads. The emitter rotates segments itself;
logrotate rules must not match them, and may only remove old rejects, as whole files:

    /var/spool/analytics/rejected/*.ndjson { weekly rotate 4 missingok nocreate nocopytruncate }
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from spool import kernel

UNFINISHED: Final = ".new"
OPEN: Final = ".open"
SEALED: Final = ".ndjson"
DEFAULT_DIRECTORY: Final = Path("/var/spool/analytics")
FILE_MODE: Final = 0o640
"""The loader reads the files as a member of their group."""
DIRECTORY_MODE: Final = 0o770
_STEM: Final = re.compile(
    r"(?P<moment>[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)"
    r"-(?P<host>[A-Za-z0-9.-]{1,64})-(?P<boot>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})-(?P<token>[0-9a-f]{8})"
    r"-(?P<number>[0-9]{6}|[1-9][0-9]{6,17})"
)
_UNFINISHED_SECONDS: Final = 60.0
"""A segment that is not renamed to `.open` within this time belongs to a dead writer."""


@dataclass(frozen=True)
class SegmentName:
    """The parts of a segment's stem. `number` counts the segments of one writer from 1."""

    moment: str
    """When the segment was created, in UTC, as `20261123T120000.000000Z`."""
    host: str
    boot: str
    pid: int
    token: str
    number: int

    @classmethod
    def parse(cls, stem: str) -> SegmentName | None:
        """Return the parts of a file name without its suffix, or None if it is not a segment name."""
        found = _STEM.fullmatch(stem)
        if found is None or int(found["number"]) == 0:
            return None
        return cls(
            found["moment"], found["host"], found["boot"], int(found["pid"]), found["token"],
            int(found["number"]),
        )  # fmt: skip

    @property
    def writer(self) -> str:
        """The writer's name: host, boot, pid and token."""
        return f"{self.host}-{self.boot}-{self.pid}-{self.token}"

    @property
    def stem(self) -> str:
        return f"{self.moment}-{self.writer}-{self.number:06d}"


class Writer(NamedTuple):
    """The identity of a writer. Two containers may share a pid and a directory, so it includes a random token."""

    host: str
    boot: str
    pid: int
    token: str

    @classmethod
    def here(cls) -> Writer:
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64] or "localhost"
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        except OSError:
            boot = "0" * 8
        return cls(host, boot, os.getpid(), secrets.token_hex(4))

    @property
    def name(self) -> str:
        """The writer's name, as in `SegmentName.writer`."""
        return f"{self.host}-{self.boot}-{self.pid}-{self.token}"

    def stem(self, number: int) -> str:
        """Return the stem of this writer's segment `number`, created now."""
        now = time.time_ns() // 1000
        moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 1_000_000))
        moment = f"{moment}.{now % 1_000_000:06d}Z"
        return SegmentName(moment, self.host, self.boot, self.pid, self.token, number).stem


class Sealed(NamedTuple):
    """The result of sealing: the file (None if it had no lines), its lines and bytes, and the bytes cut off."""

    path: Path | None
    lines: int
    bytes: int
    torn_bytes: int


def recover(path: Path, *, sync: bool = False) -> Sealed | None:
    """Seal the segment of a dead writer. Returns None if the writer is alive or another loader took it.

    If the lock is free, the writer is dead: the kernel frees the lock with the last descriptor and map
    (flock(2)). A segment that this process may read but not write, such as another user's in its group, is
    copied. Raises OSError. A file with another hard link is refused, because truncating it would also truncate
    the file under its other name.
    """
    try:
        fd, writable = os.open(path, os.O_RDWR | kernel.EXISTING_FILE), True
    except PermissionError:
        fd, writable = os.open(path, os.O_RDONLY | kernel.EXISTING_FILE), False
    try:
        kernel.lock(fd)
        if not is_file(path, fd):
            return None
        if os.fstat(fd).st_nlink != 1:
            raise OSError(errno.EMLINK, "has a second name (a hard link)", str(path))
        if os.path.lexists(path.with_suffix(SEALED)):
            raise OSError(errno.EEXIST, "its sealed name is taken until that file is loaded", str(path))
        end, torn = whole_and_torn(fd)
        lines = count_lines(fd, end)
        if writable:
            return seal(path, fd, lines, end, torn, sync=sync)
        return _seal_copy(path, fd, lines, end, torn)
    except BlockingIOError:
        return None
    finally:
        os.close(fd)


def seal(path: Path, fd: int, lines: int, end: int, torn: int, *, sync: bool = False) -> Sealed:
    """Cut the file to its `lines`, which end at `end`, and rename it; remove it if it has none.

    The caller must hold the lock of the segment. Each step is safe to repeat after an OSError. Raises
    FileNotFoundError if `path` is no longer this file.
    """
    sealed = path.with_suffix(SEALED)
    renamed = not is_file(path, fd) and is_file(sealed, fd)  # by an earlier attempt that failed to sync
    if not renamed and not is_file(path, fd):
        raise FileNotFoundError(errno.ENOENT, "segment is no longer in its directory", str(path))
    if end == 0:
        os.unlink(path)
        return Sealed(None, 0, 0, torn)
    if not renamed:
        os.ftruncate(fd, end)
        if sync:
            os.fsync(fd)
        os.rename(path, sealed)
    if sync:
        sync_directory(path.parent)
    return Sealed(sealed, lines, end, torn)


def _seal_copy(path: Path, fd: int, lines: int, end: int, torn: int) -> Sealed:
    """Seal a read-only file: copy its lines to the sealed name, then remove it.

    A crash in between leaves both: the sealed file is loaded first, then the lines of this one are recognized
    as loaded.
    """
    part, sealed = path.with_suffix(".part"), path.with_suffix(SEALED)
    if end:
        part.unlink(missing_ok=True)
        with open(os.open(part, kernel.NEW_FILE, FILE_MODE), "wb") as copy:
            copy.writelines(kernel.blocks(fd, 0, end))
            copy.flush()
            os.fsync(copy.fileno())  # the original may have been on disk for a long time
        os.rename(part, sealed)
        sync_directory(path.parent)
    os.unlink(path)
    return Sealed(sealed if end else None, lines, end, torn)


def written_bytes(directory: Path, token: str = "") -> int:
    """Return how many bytes the segments of a spool hold; 0 if there is no spool. Raises OSError.

    An open segment counts with its written bytes, not with its reserved bytes; segments of the writer with
    this `token` count with their full size. Segments that a dead writer did not finish creating are removed.
    """
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # sealed or loaded in the meantime
                if entry.name.endswith(SEALED) or (
                    entry.name.endswith(OPEN) and token and token in entry.name
                ):
                    total += entry.stat(follow_symlinks=False).st_size
                elif entry.name.endswith(OPEN):
                    total += _written(entry)
                elif entry.name.endswith(UNFINISHED):
                    _remove_unfinished(entry)
    return total


def _written(entry: os.DirEntry[str]) -> int:
    """Return the offset of the first NUL byte of an open segment, or its size if this process may not read it."""
    status = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        return 0
    try:
        fd = os.open(entry.path, os.O_RDONLY | kernel.EXISTING_FILE)
    except PermissionError:
        return status.st_size
    try:
        low, high = 0, status.st_size
        while low < high:
            middle = (low + high) // 2
            if kernel.read_at(fd, 1, middle).strip(b"\0"):
                low = middle + 1
            else:
                high = middle
        return low
    finally:
        os.close(fd)


def _remove_unfinished(entry: os.DirEntry[str]) -> None:
    path = Path(entry.path)
    if SegmentName.parse(path.stem) is None:
        return
    if time.time() - entry.stat(follow_symlinks=False).st_mtime < _UNFINISHED_SECONDS:
        return
    with contextlib.suppress(OSError):  # the file belongs to another user, or its writer is still alive
        fd = os.open(path, os.O_RDWR | kernel.EXISTING_FILE)
        try:
            kernel.lock(fd)
            if is_file(path, fd):
                os.unlink(path)
        finally:
            os.close(fd)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` survive power loss. Raises OSError."""
    fd = os.open(directory, kernel.DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_file(path: Path, fd: int) -> bool:
    """Whether `path` is the file that `fd` has open."""
    try:
        found, held = os.lstat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def whole_and_torn(fd: int) -> tuple[int, int]:
    """Return the offset after the last whole line, and the bytes of an unfinished one after it."""
    size = os.fstat(fd).st_size
    end = _end_of_lines(fd, size)
    return end, sum(len(block) - block.count(0) for block in kernel.blocks(fd, end, size))


def count_lines(fd: int, end: int) -> int:
    return sum(block.count(b"\n") for block in kernel.blocks(fd, 0, end))


def _end_of_lines(fd: int, size: int) -> int:
    """Return the offset after the last whole line.

    A copy interrupted by SIGKILL may have written its newline before its middle, so a last line with a NUL
    byte is not whole. Earlier lines were complete before that copy began.
    """
    end = _after_last_newline(fd, size)
    start = _after_last_newline(fd, end - 1)
    return start if any(0 in block for block in kernel.blocks(fd, start, end)) else end


def _after_last_newline(fd: int, end: int) -> int:
    while end > 0:
        start = max(0, end - kernel.BLOCK)
        found = kernel.read_at(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
