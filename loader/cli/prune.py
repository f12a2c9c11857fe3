"""`loader prune`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal
from loader.errors import LoaderError, UsageError

if TYPE_CHECKING:
    from loader.operate.prune import Ages, Export, Pruned, Rows


@click.command("prune")
@click.option(
    "--older-than", "age", type=options.Age(), metavar="AGE",
    help="Minimum age of all data without an option of its own, such as 90d: a number and y, w, d, h or m.",
)  # fmt: skip
@click.option("--events", type=options.Age(), metavar="AGE", help="Minimum age of events.")
@click.option("--metrics", type=options.Age(), metavar="AGE", help="Minimum age of metrics.")
@click.option("--ledger", type=options.Age(), metavar="AGE", help="Minimum age of ledger rows.")
@click.option(
    "--files", type=options.Age(), metavar="AGE", help="Minimum age of rejected and archived files."
)
@options.dsn
@options.spool_dir
@options.archive
@click.option(
    "--export", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Write each partition to a Parquet file before it is dropped; replaces an existing file.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Count old data; delete nothing.")
@options.as_json
def command(
    age: timedelta | None, events: timedelta | None, metrics: timedelta | None, ledger: timedelta | None,
    files: timedelta | None, dsn: str | None, spool_dir: Path | None, archive: Path | None,
    export: Path | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Delete old rows, ledger rows, and rejected and archived files.

    Data without an age is kept. Partitions with old ids are dropped; other rows are deleted by their
    timestamp, in small batches that do not block loading. Older lines are not loaded again: see `loader
    backfill --keep-expired`. Run it as the owner of the tables, or as a role with the DELETE privilege.

    \b
    Examples:
      loader prune --older-than 90d --dry-run
      loader prune --older-than 90d
      loader prune --events 2y --metrics 30d --ledger 90d
    """
    from loader.cli.loading import INTERRUPTED
    from loader.load import database
    from loader.operate import prune
    from loader.service.signals import until_signal

    own = (events, metrics, ledger, files)
    ages = prune.Ages(*(age if each is None else each for each in own))
    _check(ages, given=(age, *own))
    to_files = _export(export, dry_run=dry_run)
    spool = settings.spool_directory(spool_dir)
    with until_signal() as signals, database.connect(settings.database_dsn(dsn)) as connection:
        rows = prune.Rows(connection, ages, signals.stop, to_files)
        pruned = rows.count() if dry_run else _delete(rows)
    if ages.files is not None and not signals.stop.is_set():
        # The times of files come from the local clock; if it and the server's disagree, fewer files are removed.
        limit = min(rows.limits["files"] or rows.before, datetime.now(UTC) - ages.files)
        removed = prune.files(spool, archive, limit, dry_run=dry_run)
        pruned.rejected_files, pruned.archived_files = removed.rejected_files, removed.archived_files
        pruned.skipped, pruned.failures = removed.skipped, removed.failures
    _print(pruned, rows, as_json=as_json, dry_run=dry_run)
    if signals.stop.is_set():
        raise LoaderError(INTERRUPTED)
    if pruned.failures:
        raise LoaderError(f"{len(pruned.failures)} entries could not be pruned")


def _check(ages: Ages, given: tuple[timedelta | None, ...]) -> None:
    """Raise UsageError if no age is given, or an age of 0."""
    if not any(each is not None for each in given):
        raise UsageError(
            "no age is given: use --older-than AGE for all data, or any of --events, --metrics, --ledger, --files"
        )
    for name, age in vars(ages).items():
        if age is not None and not age:
            option = "ledger" if name == "loads" else name
            raise UsageError(f"an age of 0 would remove all {option}: use TRUNCATE for that")


def _export(directory: Path | None, *, dry_run: bool) -> Export | None:
    """Return the function that writes partitions to the directory. Raises UsageError if a package is missing."""
    if directory is None or dry_run:
        return None
    from loader import extras
    from loader.see import partitions

    extras.require(("pyarrow", "adbc_driver_postgresql", "adbc_driver_manager"), "export")
    return partitions.exporting(directory)


def _delete(rows: Rows) -> Pruned:
    """Delete the rows, with a progress bar."""
    from loader.cli.loading import only_for

    old, done = rows.count(), 0
    with (
        only_for("the owner of the tables, or a role with the DELETE privilege"),
        terminal.bar("rows", old.events + old.metrics + old.loads) as shown,
    ):

        def deleted(count: int) -> None:
            nonlocal done
            done += count
            shown(done)

        return rows.delete(deleted)


def _print(pruned: Pruned, rows: Rows, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        dropped = {name: vars(each) for name, each in pruned.dropped.items()}
        outcome = {"partitions": dropped, "skipped": pruned.skipped, "failures": pruned.failures}
        limits = {"before": rows.before, "limits": rows.limits}
        terminal.print_json({**limits, "dry_run": dry_run, **pruned.counts(), **outcome})
    else:
        for name, each in pruned.dropped.items():
            newer = f", {each.newer} of them with a newer timestamp" if each.newer else ""
            terminal.say(f"{'old' if dry_run else 'dropped'}: {name}: {each.rows} rows{newer}")
        terminal.say(f"{'older' if dry_run else 'removed'}: {terminal.counts(pruned.counts())}")
    for name, reason in (pruned.skipped | pruned.failures).items():
        terminal.warn(f"{name} {reason}")
