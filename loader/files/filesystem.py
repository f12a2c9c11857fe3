"""Detects file systems whose locks may not reach other hosts: network and FUSE file systems.

There flock(2) can be local to each host (NFS with local_lock=flock, CIFS with nobrl, FUSE without locks), so
a free lock proves nothing about a writer on another host.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_NETWORK: Final = {
    0x6969: "nfs", 0x517B: "smb", 0xFF534D42: "cifs", 0xFE534D42: "smb2", 0x65735546: "fuse",
    0x01021997: "9p", 0x00C36400: "ceph", 0x5346414F: "afs", 0x6B414653: "kafs", 0x73757245: "coda",
    0x564C: "ncp", 0x01161970: "gfs2", 0x7461636F: "ocfs2", 0x0BD00BD0: "lustre", 0x47504653: "gpfs",
    0x19830326: "beegfs", 0x20030528: "orangefs", 0xAAD7AAEA: "panfs",
    0x786F4256: "vboxsf", 0xBACBACBC: "vmhgfs",
}  # fmt: skip
"""File system types of statfs(2), from linux/magic.h."""
_STATFS_BYTES: Final = 256
"""Larger than struct statfs on any platform; its first member is the type."""


def network_type(path: Path) -> str | None:
    """Return the name of the network or FUSE file system that contains `path`, or None if it is local."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    statfs = ctypes.CDLL(None, use_errno=True).statfs
    if statfs(os.fsencode(path), buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return _NETWORK.get(ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF)
