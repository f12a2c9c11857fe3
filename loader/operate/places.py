"""Where files with people's data are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Where files are: the spool, an archive, and directories with exported files."""

    spool: Path
    archive: Path | None = None
    exports: Sequence[Path] = ()
