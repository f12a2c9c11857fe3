"""Opens directories and files without following links, so that no file outside a directory is touched.

Any user with write access to the spool could replace a directory or a file in it by a link. So a directory is
opened with O_NOFOLLOW (open(2)), and all operations on names in it are relative to its descriptor, which
keeps referring to that directory whatever happens to its path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from spool.segment import FILE_MODE

MODE: Final = 0o770
"""Set regardless of the umask, because the next loader may be another user of the group. The set-group-id bit
is inherited; requesting it has no effect (mkdir(2)), and systemd's RestrictSUIDSGID forbids it
(systemd.exec(5))."""


@contextlib.contextmanager
def opened(path: Path | str, directory: int | None = None, *, create: bool = False) -> Iterator[int]:
    """Yield a descriptor of the directory. Raises OSError, also for a link to a directory."""
    made = False
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, MODE, dir_fd=directory)
            made = True
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            raise NotADirectoryError(
                error.errno, "is a link or not a directory: move it away", str(path)
            ) from None
        raise
    try:
        if made:
            with contextlib.suppress(OSError):  # some file systems do not support modes
                os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | MODE)
            hand_over(descriptor, os.stat("..", dir_fd=descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def create_file(name: str, directory: int) -> BinaryIO:
    """Create a file for writing, replacing one left by an interrupted attempt. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, FILE_MODE, dir_fd=directory)
    hand_over(descriptor, os.fstat(directory))
    return open(descriptor, "wb")


def hand_over(descriptor: int, parent: os.stat_result) -> None:
    """Give a file created by root to the owner of its directory, who has to work with it afterwards."""
    if os.geteuid() == 0 and parent.st_uid != 0:
        os.fchown(descriptor, parent.st_uid, parent.st_gid)


def open_file(path: Path | str, directory: int | None = None) -> BinaryIO:
    """Open a regular file for reading. Raises OSError, also for a link, a pipe or a device."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return open(descriptor, "rb")


def names(directory: int, suffixes: tuple[str, ...]) -> list[str]:
    """Return the sorted names of the regular files with one of `suffixes`. Raises OSError."""
    with os.scandir(directory) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.endswith(suffixes) and entry.is_file(follow_symlinks=False)
        )
