"""Reads the accounts of a spool's writers (spool/account.py) and counts their lines still in the spool.

The order of reads makes the comparison with the ledger exact even while lines are written and loaded: first
the account, then the list of files in the spool, then the ledger. Each segment covered by an account is then
in the list or in the ledger, unless it is missing, because a file is removed only once the ledger has it.

The file of a dead writer is removed when the database has its account and none of its lines wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loader.files import nofollow
from loader.files.writing import is_locked
from spool import account
from spool.account import DIRECTORY, Statement, report_line
from spool.segment import OPEN, SEALED, UNFINISHED, SegmentName, Writer, count_lines, whole_and_torn

LARGEST_BACKLOG: Final = 1 << 28
"""If the spool has more bytes than this, waiting lines are not counted; the comparison is made later."""


@dataclass(frozen=True)
class Stated:
    """An account, whether its writer has ended, and the lines of each of its segments in the spool."""

    statement: Statement
    ended: bool
    pending: Mapping[int, int]

    @property
    def is_settled(self) -> bool:
        """Whether the file is no longer needed once the database has the account."""
        return self.ended and not self.pending and not self.statement.unreported


def prepare(spool: Path) -> None:
    """Create the directory for the accounts of writers. Raises OSError."""
    with nofollow.opened(spool / DIRECTORY, create=True):
        pass


def statements(spool: Path) -> list[tuple[Statement, bool]]:
    """Return the accounts of all writers, and whether each writer has ended. Raises OSError."""
    with contextlib.suppress(FileNotFoundError), nofollow.opened(spool / DIRECTORY) as directory:
        return list(_statements(directory))
    return []


def _statements(directory: int) -> Iterator[tuple[Statement, bool]]:
    for name in nofollow.names(directory, ("",)):
        if SegmentName.parse(f"20260101T000000.000000Z-{name}-000001") is None:
            continue
        with (
            contextlib.suppress(FileNotFoundError, PermissionError),
            nofollow.open_file(name, directory) as file,
        ):
            ended = not is_locked(file.fileno())
            if (statement := account.decode(name, file.read(account.BYTES + 1))) is not None:
                yield statement, ended


def with_pending(spool: Path, found: Sequence[tuple[Statement, bool]]) -> list[Stated] | None:
    """Add the lines of each writer that wait in the spool. Returns None if too many wait. Raises OSError."""
    pending = _pending(spool) if found else {}
    if pending is None:
        return None
    return [Stated(statement, ended, pending.get(statement.writer, {})) for statement, ended in found]


def with_unstated(
    spool: Path, found: Sequence[tuple[Statement, bool]], loaded: Mapping[str, int]
) -> list[Stated] | None:
    """Do as `with_pending`, and add writers without an account that have waiting lines.

    `loaded` is the last segment of each writer in an earlier reading of the ledger. Later segments are
    ignored, because a listing may contain a file created in the meantime but not the one before it.
    """
    if (pending := _pending(spool)) is None:
        return None
    known = {statement.writer for statement, _ in found}
    unstated = [
        (Statement(writer, 0, 0, 0, loaded.get(writer, 0), 0, ()), False)
        for writer in pending
        if writer not in known
    ]
    return [Stated(each, ended, pending.get(each.writer, {})) for each, ended in [*found, *unstated]]


def _pending(spool: Path) -> dict[str, dict[int, int]] | None:
    """Return the lines of each segment in the spool, by writer, or None if there are too many to count."""
    pending: defaultdict[str, dict[int, int]] = defaultdict(dict)
    size = 0
    with nofollow.opened(spool) as directory:
        for name in nofollow.names(directory, (OPEN, SEALED)):
            if (segment := SegmentName.parse(os.path.splitext(name)[0])) is None:
                continue
            # A segment sealed in between is found under its new name; one that no longer exists is in the
            # ledger.
            for each in dict.fromkeys((name, segment.stem + SEALED)):
                with contextlib.suppress(FileNotFoundError), nofollow.open_file(each, directory) as file:
                    if (size := size + os.fstat(file.fileno()).st_size) > LARGEST_BACKLOG:
                        return None
                    pending[segment.writer][segment.number] = _count(file.fileno())
                    break
    return dict(pending)


def _count(fd: int) -> int:
    """Count the whole lines of a segment, open or sealed."""
    return count_lines(fd, whole_and_torn(fd)[0])


def recover_drops(spool: Path, statement: Statement) -> int:
    """Report the drops that a dead writer has not reported as metrics; return how many.

    The metrics are written to a sealed segment. If this is interrupted and repeated, its lines are
    duplicates. Raises OSError.
    """
    if not statement.unreported:
        return 0
    stem = Writer.here().stem(1)
    with _taken(spool, statement.writer) as fd, nofollow.opened(spool) as directory:
        if fd is None:
            return 0
        with nofollow.create_file(stem + UNFINISHED, directory) as file:
            file.writelines(
                report_line(statement.writer, statement.began, report) for report in statement.unreported
            )
            file.flush()
            os.fsync(file.fileno())
        os.rename(stem + UNFINISHED, stem + SEALED, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
        _replace_with_reported(spool, statement.writer, os.pread(fd, account.BYTES, 0))
    return sum(report.end - report.begin for report in statement.unreported)


def _replace_with_reported(spool: Path, writer: str, data: bytes) -> None:
    """Replace a dead writer's file by a copy in which all drops are marked as reported. Raises OSError.

    The file itself may belong to another user, and be read-only for the group.
    """
    reported = bytearray(data)
    for offset, count in account.as_reported(data):
        struct.pack_into("=Q", reported, offset, count)
    with nofollow.opened(spool / DIRECTORY) as directory:
        with nofollow.create_file(writer + UNFINISHED, directory) as file:
            file.write(reported)
            file.flush()
            os.fsync(file.fileno())
        os.rename(writer + UNFINISHED, writer, src_dir_fd=directory, dst_dir_fd=directory)


def remove(spool: Path, statement: Statement) -> None:
    """Remove the file of a dead writer, unless the writer is active again. Raises OSError."""
    with _taken(spool, statement.writer) as fd:
        if fd is not None:
            os.unlink(spool / DIRECTORY / statement.writer)


@contextlib.contextmanager
def _taken(spool: Path, writer: str) -> Iterator[int | None]:
    """Yield a descriptor of a dead writer's locked file, or None if it no longer exists or its writer is alive.

    The lock is shared, which does not require the file to be open for writing on any file system. It excludes
    the writer; `loader.files.lock` excludes other loaders.
    """
    with contextlib.ExitStack() as until:
        try:
            directory = until.enter_context(nofollow.opened(spool / DIRECTORY))
            file = until.enter_context(nofollow.open_file(writer, directory))
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            yield None
        else:
            yield file.fileno()
