"""Exports a partition before it is dropped: one file, named after it, so that a repetition replaces it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loader.load.database import Connection, transaction
from loader.see.export import SOURCES, Export, Range


def exporting(directory: Path) -> Callable[[Connection, str, str], int]:
    """Return what writes a partition, given by source and name, below a directory and returns its rows.

    The file is on the disk when it returns. It raises OSError, LoaderError, psycopg.Error.
    """

    def export(connection: Connection, source: str, partition: str) -> int:
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / f"{partition.rpartition('.')[2]}.parquet"
        made = Export(replace(SOURCES[source], table=partition), "parquet")
        with transaction(connection):
            made.to_file(connection, Range(None, None), target)
        for path in (target, directory):
            _sync(path)
        return made.exported.rows

    return export


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
