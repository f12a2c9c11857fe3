"""`loader doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from loader.cli import options, terminal
from loader.errors import LoaderError


@click.command("doctor")
@options.dsn
@options.spool_dir
@options.archive
@options.workers
@options.as_json
def command(
    dsn: str | None, spool_dir: Path | None, archive: Path | None, workers: int, as_json: bool
) -> None:
    """Check everything that the loader needs, and print remedies. Changes nothing.

    Run it as the loader's user: `sudo -u analytics loader doctor`.

    \b
    Examples:
      loader doctor
      loader doctor --json
    """
    from loader.operate import doctor
    from loader.operate.finding import Verdict

    findings = list(doctor.examine(spool_dir, dsn, archive, workers))
    if as_json:
        terminal.print_json([finding.facts() for finding in findings])
    for finding in () if as_json else findings:
        style = {Verdict.OK: "green", Verdict.WARNING: "yellow"}.get(finding.verdict, "red")
        terminal.say(f"{finding.verdict:<8} {finding.check:<11} {finding.finding}", style)
        if finding.remedy:
            terminal.say(f"{'':20} do: {finding.remedy}")
    failed = [finding for finding in findings if finding.verdict is Verdict.FAILED]
    if failed:
        error = LoaderError(f"failed: {', '.join(dict.fromkeys(finding.check for finding in failed))}")
        error.exit_code = min(finding.exit_code for finding in failed)
        raise error
