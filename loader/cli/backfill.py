"""`loader backfill`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal

if TYPE_CHECKING:
    from loader.operate.backfill import GivenFile


@click.command("backfill")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(allow_dash=True))
@options.dsn
@options.spool_dir
@options.workers
@click.option("--dry-run", is_flag=True, help="Check every line without a database; load nothing.")
@click.option("--again", is_flag=True, help="Also load chunks that are in the ledger: restores deleted rows.")
@click.option(
    "--keep-expired", is_flag=True,
    help="Also load lines older than what `loader prune` deleted. Questions then count them twice. Implies "
    "--again.",
)  # fmt: skip
@options.as_json
def command(
    paths: tuple[str, ...], dsn: str | None, spool_dir: Path | None, workers: int, dry_run: bool,
    again: bool, keep_expired: bool, as_json: bool,
) -> None:  # fmt: skip
    """Load files, directories, or - for standard input.

    Files may be compressed with gzip, zstd, bzip2 or xz, and are never modified. Rejected lines are written
    to the spool's rejected/. Files that are already loaded are skipped unless --again is given. Lines older
    than what `loader prune` deleted count as expired and are not loaded unless --keep-expired is given.

    \b
    Examples:
      loader backfill --dry-run archive/
      loader backfill archive/ older.ndjson.gz
      zcat older.ndjson.gz | loader backfill -
      loader backfill --again archive/
    """
    from loader.cli.loading import dsn_source, finish, patient_workers
    from loader.load.partitions import Ahead
    from loader.operate import backfill
    from loader.service import log_format
    from loader.service.signals import until_signal

    log_format.to_stderr()
    found = backfill.find(paths, again=again or keep_expired, keep_expired=keep_expired)
    files = found.files
    for name, reason in found.skipped.items():
        terminal.warn(f"skipped {name}: {reason}")
    if dry_run:
        _dry_run(files, as_json)
        return
    source, spool = dsn_source(dsn), settings.spool_directory(spool_dir)
    ahead = Ahead(source)
    for file in files:
        file.prepare = ahead.prepare
    with (
        until_signal() as signals,
        contextlib.closing(patient_workers(source, spool, workers, signals)) as pool,
    ):
        with terminal.bar_over(files):
            report = pool.load(files)
        finish(report, signals, as_json=as_json)


def _dry_run(files: list[GivenFile], as_json: bool) -> None:
    from loader.cli.loading import finish
    from loader.operate import backfill
    from loader.service.run import Report

    with terminal.bar_over(files):
        checked = backfill.dry_run(files)
    if not as_json:
        for code, count in sorted(checked.codes.items()):
            terminal.say(f"would be rejected: {count} {code}")
    report = Report(checked.loaded, len(files) - len(checked.failures), checked.failures)
    finish(report, None, as_json=as_json, codes=checked.codes)
