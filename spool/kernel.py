"""System calls that segments need and that a platform may lack or Python does not wrap.

Linux has them all. macOS cannot reserve space, so lines are written, not mapped. Windows has neither `flock`
nor `pread`: every function raises OSError (ENOTSUP) there, and the emitter drops and counts lines. Calls
through ctypes release the GIL: use them when a segment is created, never in an emit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

if sys.platform != "win32":
    import fcntl

    NEW_FILE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    EXISTING_FILE: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
else:
    NEW_FILE = EXISTING_FILE = DIRECTORY = 0

SUPPORTED: Final = sys.platform != "win32"
BLOCK: Final = 1 << 20
"""Bytes per read: with other busy threads, getting the GIL back after each read takes milliseconds."""


def check_platform() -> None:
    """Raise OSError (ENOTSUP) if segments cannot be written."""
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "this platform has no flock; emit on Linux or macOS")


def lock(fd: int) -> None:
    """Take the exclusive flock of a file. Raises BlockingIOError if another process holds it."""
    check_platform()
    if sys.platform != "win32":
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def share(fd: int, directory: Path, mode: int) -> None:
    """Let the directory's group read the file, regardless of the umask and the user of this process."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # some file systems do not support modes
            os.fchmod(fd, mode)
        group = os.stat(directory).st_gid
        if os.fstat(fd).st_gid != group:
            with contextlib.suppress(OSError):  # only root may set an arbitrary group
                os.fchown(fd, -1, group)


def read_at(fd: int, size: int, offset: int) -> bytes:
    check_platform()
    if sys.platform != "win32":
        return os.pread(fd, size, offset)
    return b""


def write_at(fd: int, data: bytes, offset: int) -> int:
    check_platform()
    if sys.platform != "win32":
        return os.pwrite(fd, data, offset)
    return 0


def blocks(fd: int, start: int, end: int) -> Iterator[bytes]:
    return (read_at(fd, min(BLOCK, end - at), at) for at in range(start, end, BLOCK))


def reserve(fd: int, size: int) -> None:
    """Reserve disk space for `size` bytes. Raises OSError.

    Writing to an unreserved hole of a map when the disk is full raises SIGBUS; reserving it fails with an
    ordinary ENOSPC (posix_fallocate(3)).
    """
    if sys.platform == "linux":
        os.posix_fallocate(fd, 0, size)


_OVERWRITES_IN_PLACE: Final = {
    0xEF53: "ext2, ext3, ext4",
    0x58465342: "XFS",  # copies on write only blocks shared by two files, which blocks of a new file are not
    0x01021994: "tmpfs",
    0x3153464A: "JFS",
}
"""`f_type` (statfs(2), linux/magic.h) of the file systems that overwrite a block reserved by posix_fallocate
in place, so that writing to a mapped page cannot run out of space. On all others (btrfs, ZFS, bcachefs, F2FS,
NILFS; overlayfs, NFS, FUSE, whose storage is unknown) it may raise SIGBUS, or block for half a minute while
holding the GIL (btrfs with NOCOW on a full disk)."""
_STATFS_BYTES: Final = 256
"""Larger than `struct statfs` on any architecture; `f_type` is its first member."""
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python does not define it
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    )  # fmt: skip
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library


def _call(function: Any, *arguments: object) -> Any:
    """Call a libc function. Near the recursion limit it raises RecursionError instead of ctypes' own error."""
    try:
        return function(*arguments)
    except ctypes.ArgumentError as error:  # raised for any exception during the conversion of arguments
        raise RecursionError(str(error)) from None


def overwrites_in_place(fd: int) -> bool:
    """Whether writing to a map of the file is safe when the disk is full."""
    if sys.platform != "linux":
        return False
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _call(_libc().fstatfs, fd, buffer) != 0:
        return False
    kind = ctypes.c_long.from_buffer(buffer).value
    return kind & 0xFFFFFFFF in _OVERWRITES_IN_PLACE


def map_file(fd: int, size: int) -> mmap.mmap:
    """Map `size` bytes of a file, shared and writable. Raises OSError.

    `mmap.mmap(fd, ...)` keeps a copy of the descriptor and closes that number with the map, whatever file it
    is by then (a daemonizing application closes all descriptors, then opens files of its own). So anonymous
    memory is mapped, and the file over it at the same address. The map keeps the file and its flock alive.
    """
    memory = mmap.mmap(-1, size)
    if sys.platform == "win32":
        return memory
    access = mmap.PROT_READ | mmap.PROT_WRITE
    mapped = _call(_libc().mmap, _address(memory), size, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0)
    if mapped == _MAP_FAILED:
        error = ctypes.get_errno()
        memory.close()
        raise OSError(error, os.strerror(error))
    return memory


def populate(memory: mmap.mmap) -> None:
    """Prefault the pages of the map, so that later writes cause no page faults, if the kernel can (madvise(2)).

    `mmap.madvise` would hold the GIL for the milliseconds it takes. No other thread may know the map yet.
    """
    _call(_libc().madvise, _address(memory), len(memory), _MADV_POPULATE_WRITE)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
