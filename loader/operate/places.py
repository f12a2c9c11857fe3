"""The locations of files that contain personal data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The directories with files: the spool, an archive, and directories of exported files."""

    spool: Path
    archive: Path | None = None
    exports: Sequence[Path] = ()
