"""Removes people from files that `loader export` wrote: NDJSON, CSV and Parquet.

Their rows are removed, and in the rows of other people the id becomes zeros. Any other file is treated like a file of
the archive (loader.files.erase).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

from loader.files import erase, nofollow
from loader.files.erase import Swept
from loader.files.mentions import IDENTITY, Mentions

_PARQUET_ROWS: Final = 1 << 15
_LONGEST_FIELD: Final = 1 << 27
"""Maximum size of a CSV value in bytes. `metadata` itself has no limit."""


def sweep(root: Path, mentions: Mentions, *, dry_run: bool = False) -> Swept:
    """Remove people from the exported files below a directory. Failures are recorded in the result."""
    swept = Swept()
    for directory, name, shown in erase.walk(root, swept):
        with erase.noting(swept, shown):
            write = _WRITERS.get(Path(name).suffix)
            if write is None:
                erase.sweep_file(directory, name, mentions, swept, dry_run=dry_run)
            else:
                with nofollow.open_file(name, directory) as file:
                    _sweep_file(file, directory, name, mentions, swept, write, dry_run=dry_run)
    return swept


def _sweep_file(
    file: BinaryIO, directory: int, name: str, mentions: Mentions, swept: Swept,
    write: Callable[[BinaryIO, BinaryIO, Mentions, Swept], None], *, dry_run: bool,
) -> None:  # fmt: skip
    """Rewrite a file if that changes it. The trial run finds ids that compression hides in a Parquet file."""
    trial, before = Swept(), file.tell()
    with _Discarded() as nowhere:
        write(file, nowhere, mentions, trial)
    swept += trial
    if trial.lines or trial.mentions:
        swept.files += 1
        swept.hits += 1
        if not dry_run:
            file.seek(before)
            with erase.replacing(file, directory, name) as copy:
                write(file, copy, mentions, Swept())


class _Discarded(io.BytesIO):
    """A file that discards its content and only counts its size."""

    _size = 0

    def write(self, data: Any, /) -> int:
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size


def _ndjson(file: BinaryIO, copy: BinaryIO, mentions: Mentions, swept: Swept) -> None:
    for line in file:
        swept.bytes += len(line)
        content = line.rstrip(b"\r\n")
        kept = mentions.applied(content)
        if kept is None:
            swept.lines += 1
            continue
        swept.mentions += kept is not content
        copy.write(line if kept is content else kept.rstrip() + b"\n")


def _csv(file: BinaryIO, copy: BinaryIO, mentions: Mentions, swept: Swept) -> None:
    csv.field_size_limit(_LONGEST_FIELD)
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    rows = csv.reader(text)
    header = next(rows, [])
    mine = [place for place, name in enumerate(header) if name in IDENTITY]
    copy.write(_csv_line(header))
    for row in rows:
        swept.bytes += sum(map(len, row))
        if any(mentions.in_text(row[place]) for place in mine if place < len(row)):
            swept.lines += 1
            continue
        kept = [_redacted(value, mentions) for value in row]
        swept.mentions += kept != row
        copy.write(_csv_line(kept))
    text.detach()


def _csv_line(values: list[str]) -> bytes:
    """Return a row as COPY writes it: values are quoted only if necessary."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode("utf-8", "surrogateescape")


def _redacted(value: str, mentions: Mentions) -> str:
    encoded = value.encode("utf-8", "surrogateescape")
    return (
        mentions.redacted(encoded).decode("utf-8", "surrogateescape") if mentions.concern(encoded) else value
    )


def _parquet(file: BinaryIO, copy: BinaryIO, mentions: Mentions, swept: Swept) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise OSError("a Parquet file needs `pip install 'analytics-spool[export]'`") from None
    try:
        source = pq.ParquetFile(file)
        with pq.ParquetWriter(copy, source.schema_arrow, compression="zstd") as writer:
            for batch in source.iter_batches(_PARQUET_ROWS):
                writer.write_table(_kept_rows(pa.Table.from_batches([batch]), mentions, swept))
    except pa.ArrowException as error:
        raise OSError(f"is not a Parquet file: {error}") from error


def _kept_rows(table: Any, mentions: Mentions, swept: Swept) -> Any:
    import pyarrow as pa

    texts = [name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)]
    kept = [True] * table.num_rows
    changed = [False] * table.num_rows
    for name in texts:
        values = table.column(name).to_pylist()
        swept.bytes += sum(len(value) for value in values if value)
        found = [value is not None and mentions.in_text(value) for value in values]
        if not any(found):
            continue
        if name in IDENTITY:
            kept = [stays and not hit for stays, hit in zip(kept, found, strict=True)]
        changed = [was or hit for was, hit in zip(changed, found, strict=True)]
        new = pa.array(
            [value and _redacted(value, mentions) for value in values], table.schema.field(name).type
        )
        table = table.set_column(table.column_names.index(name), table.schema.field(name), new)
    swept.lines += kept.count(False)
    swept.mentions += sum(was and stays for was, stays in zip(changed, kept, strict=True))
    return table.filter(pa.array(kept)) if not all(kept) else table


_WRITERS: Final = {".ndjson": _ndjson, ".jsonl": _ndjson, ".csv": _csv, ".parquet": _parquet}
