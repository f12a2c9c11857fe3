"""`loader prune`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from loader import settings
from loader.cli import options, terminal
from loader.errors import LoaderError


@click.command("prune")
@click.option(
    "--older-than", "age", type=options.Age(), required=True, metavar="AGE",
    help="Such as 90d: a number and w, d, h or m.",
)  # fmt: skip
@options.dsn
@options.spool_dir
@options.archive
@click.option("--dry-run", is_flag=True, help="Count what is old, and remove nothing.")
@options.as_json
def command(
    age: timedelta, dsn: str | None, spool_dir: Path | None, archive: Path | None, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Remove old rows, ledger rows, and rejected and archived files.

    Rows are deleted by their timestamp and the server's clock, in small batches that do not block loading.
    Run it as the owner of the tables, or as a role that may delete.

    \b
    Examples:
      loader prune --older-than 90d --dry-run
      loader prune --older-than 90d
    """
    from loader.cli.loading import INTERRUPTED, only_for
    from loader.load import database
    from loader.operate import prune
    from loader.service.signals import until_signal

    spool = settings.spool_directory(spool_dir)
    with until_signal() as signals, database.connect(settings.database_dsn(dsn)) as connection:
        rows = prune.Rows(connection, age, signals.stop)
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

                pruned = rows.delete(deleted)
    if not signals.stop.is_set():
        # The local clock wrote the times of the files; if the two disagree, less is removed.
        files = prune.files(spool, archive, min(rows.before, datetime.now(UTC) - age), dry_run=dry_run)
        files.events, files.metrics, files.loads = pruned.events, pruned.metrics, pruned.loads
        pruned = files
    if as_json:
        outcome = {"skipped": pruned.skipped, "failures": pruned.failures}
        terminal.print_json({"before": rows.before, "dry_run": dry_run, **pruned.counts(), **outcome})
    else:
        terminal.say(f"{'older' if dry_run else 'removed'}: {terminal.counts(pruned.counts())}")
    for name, reason in (pruned.skipped | pruned.failures).items():
        terminal.warn(f"{name} {reason}")
    if signals.stop.is_set():
        raise LoaderError(INTERRUPTED)
    if pruned.failures:
        raise LoaderError(f"{len(pruned.failures)} entries could not be pruned")
