"""The locations of files that contain personal data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The directories to search: the spool, the archive if there is one, and directories of exported files."""

    spool: Path
    archive: Path | None = None
    exports: Sequence[Path] = ()
