"""The only deletion of sealed data: a file goes once all of it is committed, if it is still that file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loader import directory


@dataclass(frozen=True)
class Version:
    """Which file a path named, and in which state it was read."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Version:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def retire(path: Path, loaded: Version, keep: Path | None = None) -> bool:
    """Remove a loaded file, or move it to `keep`; False where `path` now names another or a changed file.

    A file that is gone already is retired. Raises OSError, as for a directory that is read-only.
    """
    try:
        if Version.of(os.lstat(path)) != loaded:
            return False
        if keep is None:
            os.unlink(path)
        else:
            with directory.opened(keep.parent, create=True) as fd:
                os.rename(path, keep.name, dst_dir_fd=fd)
    except FileNotFoundError:
        pass
    return True
