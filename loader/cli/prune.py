"""`loader prune`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click

from loader import settings
from loader.cli import options, terminal
from loader.cli.loading import INTERRUPTED, only_for
from loader.errors import LoaderError
from loader.load import database
from loader.operate import prune
from loader.service.signals import until_signal


@click.command("prune")
@click.option(
    "--older-than", "before", type=options.Age(), required=True, metavar="AGE",
    help="Such as 90d: a number and w, d, h or m.",
)  # fmt: skip
@options.dsn
@options.spool_dir
@options.archive
@click.option("--dry-run", is_flag=True, help="Count what is old, and remove nothing.")
@options.as_json
def command(
    before: datetime, dsn: str | None, spool_dir: Path | None, archive: Path | None, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Remove old rows, ledger rows, and rejected and archived files.

    Rows are deleted by their timestamp, in small batches that do not block loading. Run it as the owner of
    the tables, or as a role that may delete.

    \b
    Examples:
      loader prune --older-than 90d --dry-run
      loader prune --older-than 90d
    """
    spool = settings.spool_directory(spool_dir)
    with until_signal() as signals, database.connect(settings.database_dsn(dsn)) as connection:
        rows = prune.Rows(connection, before)
        pruned = rows.count()
        if not dry_run:
            done = 0
            total = pruned.events + pruned.metrics + pruned.loads
            actor = "the owner of the tables, or a role that may DELETE"
            with only_for(actor), terminal.bar("rows", total) as shown:

                def deleted(count: int) -> None:
                    nonlocal done
                    done += count
                    shown(done)

                pruned = rows.delete(signals.stop, deleted)
    if not signals.stop.is_set():
        files = prune.files(spool, archive, before, dry_run=dry_run)
        pruned.rejected_files, pruned.archived_files = files.rejected_files, files.archived_files
    if as_json:
        terminal.print_json({"before": before, "dry_run": dry_run, **asdict(pruned)})
    else:
        terminal.say(f"{'older' if dry_run else 'removed'}: {terminal.counts(asdict(pruned))}")
    if signals.stop.is_set():
        raise LoaderError(INTERRUPTED)
