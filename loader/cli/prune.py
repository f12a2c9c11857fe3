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
    help="Minimum age, such as 90d: a number and w, d, h or m.",
)  # fmt: skip
@options.dsn
@options.spool_dir
@options.archive
@click.option("--dry-run", is_flag=True, help="Count old data, and delete nothing.")
@options.as_json
def command(
    age: timedelta, dsn: str | None, spool_dir: Path | None, archive: Path | None, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Delete old rows, ledger rows, and rejected and archived files.

    The age of a row is that of its timestamp by the server's clock. Rows are deleted in small batches that do
    not block loading. Run it as the owner of the tables, or as a role with the DELETE privilege.

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
        # File times are from the local clock; if the two clocks differ, the earlier time counts, so less is
        # deleted.
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
