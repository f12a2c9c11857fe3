"""`loader export`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

import click

from loader import extras, settings
from loader.cli import answers, options, terminal
from loader.cli.options import Person
from loader.errors import LoaderError, UsageError
from loader.operate.places import Places
from loader.see.catalogue import FORMATS, TABLES, Format
from loader.see.period import instant, zone

if TYPE_CHECKING:
    from loader.see.export import Range

STDOUT: Final = Path("-")
_NEEDED: Final = ("pyarrow", "adbc_driver_postgresql")


@click.command("export")
@click.argument("target", type=click.Path(allow_dash=True, path_type=Path), metavar="OUT")
@click.option(
    "--table", type=click.Choice(TABLES), default="events", show_default=True, help="The table to export."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Default: from the suffix of OUT; Parquet with --by day.",
)
@click.option(
    "--by", type=click.Choice(("day",)), help="Write a file per day: OUT/day=2026-11-24/part.parquet."
)
@click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME:TYPE",
    help="Export a JSON value as a column, such as metadata.duration_ms:float. Types: text, int, float, "
    "bool.",
)
@click.option(
    "--since",
    metavar="WHEN",
    help="Beginning of the range: a date, a time, or an age such as 28d; default: all.",
)
@click.option("--until", metavar="WHEN", help="End of the range (excluded); default: all.")
@click.option("--user", type=Person(), metavar="UUID", help="Export all data about a person, as NDJSON.")
@answers.tz
@options.dsn
@options.spool_dir
@options.archive
@options.as_json
def command(
    target: Path, table: str, form: Format | None, by: str | None, columns: tuple[str, ...],
    since: str | None, until: str | None, user: UUID | None, tz: str, dsn: str | None, spool_dir: Path | None,
    archive: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write events or metrics to Parquet, CSV or NDJSON, or all data about a person.

    OUT is a file, - for standard output, or a directory with --by day. NDJSON can be loaded with
    `loader backfill`. Ids are text and times are UTC.

    With --user, every table, the spool with its rejects, and the archive are searched; each line names its source.

    \b
    Examples:
      loader export events.parquet --column metadata.duration_ms:float
      loader export archive --by day --since 7d
      loader export metrics.csv --table metrics --since 2026-11-01
      loader export - --format ndjson > events.ndjson
      loader export anna.ndjson --user 0190163d-8694-739b-aea5-966c26f8ad91 --archive archive
    """
    if user is not None:
        if form not in (None, "ndjson") or by or columns or since or until:
            raise UsageError(
                "--user can only be combined with --spool-dir and --archive: it always writes all data as NDJSON"
            )
        _check(target, None, "ndjson", as_json=as_json)
        places = Places(settings.spool_directory(spool_dir), archive and archive.absolute())
        _disclose(settings.database_dsn(dsn), places, user, target, as_json=as_json)
        return
    from loader.see import export, questions
    from loader.see.export import SOURCES, Export

    chosen = form or _format(target, by)
    made = Export(SOURCES[table], chosen, [export.column(each) for each in columns])
    rows = _range(since, until, tz)
    _check(target, by, chosen, as_json=as_json)
    with questions.reading(settings.database_dsn(dsn)) as connection:
        if by:
            made.by_day(connection, rows, target, zone(tz))
        else:
            made.to_file(connection, rows, target)
    if as_json:
        terminal.print_json(asdict(made.exported))
    elif target != STDOUT:
        facts = asdict(made.exported)
        facts.pop("misfits")
        terminal.say(terminal.counts(facts))
    for name, count in made.exported.misfits.items():
        terminal.warn(f'column "{name}": {count} values have another type and are null: choose text')


def _disclose(dsn: str, places: Places, person: UUID, target: Path, *, as_json: bool) -> None:
    from loader.load import database
    from loader.operate.disclose import disclose
    from loader.see.whole import whole_file

    with database.connect(dsn) as connection:
        if target == STDOUT:
            disclosed = disclose(connection, places, person, sys.stdout.buffer)
        else:
            with whole_file(target) as file:
                disclosed = disclose(connection, places, person, file)
    if as_json:
        terminal.print_json({**disclosed.counts(), "failures": disclosed.failures})
    elif target != STDOUT:
        terminal.say(terminal.counts(disclosed.counts()))
    for name, reason in disclosed.failures.items():
        terminal.warn(f"{name} {reason}")
    if disclosed.failures:
        raise LoaderError(
            f"{len(disclosed.failures)} tables or files could not be searched: the disclosure is incomplete"
        )


def _format(target: Path, by: str | None) -> Format:
    if by:
        return "parquet"
    for form in FORMATS:
        if target.suffix == f".{form}":
            return form
    raise UsageError(
        f'unknown format of "{target}": use the suffix .parquet, .csv or .ndjson, or give --format'
    )


def _range(since: str | None, until: str | None, tz: str) -> Range:
    from loader.see.export import Range

    where, now = zone(tz), datetime.now(UTC)
    rows = Range(
        instant(since, where, now, "--since") if since else None,
        instant(until, where, now, "--until") if until else None,
    )
    if rows.since and rows.until and rows.since >= rows.until:
        raise UsageError(f'--since "{since}" is not before --until "{until}": choose an earlier --since')
    return rows


def _check(target: Path, by: str | None, form: Format, *, as_json: bool) -> None:
    """Raise UsageError for an output that cannot be written, before anything is read."""
    if target == STDOUT and (by or form == "parquet" or as_json):
        raise UsageError("standard output supports only CSV and NDJSON, without --by and --json: name a file")
    if by and target.exists() and not target.is_dir():
        raise UsageError(f'"{target}" is not a directory: --by day writes a file per day into a directory')
    if not by and target.is_dir():
        raise UsageError(f'"{target}" is a directory: name a file, or give --by day')
    if target != STDOUT and not by and not os.access(target.absolute().parent, os.W_OK):
        raise UsageError(f'"{target.absolute().parent}" is not a writable directory: choose another')
    if form == "parquet":
        extras.require(_NEEDED, "export")
