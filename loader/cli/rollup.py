"""`loader rollup`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from loader import settings
from loader.cli import options, terminal
from loader.errors import LoaderError, UsageError

if TYPE_CHECKING:
    from loader.load.database import Connection

_PATIENCE_SECONDS: Final = 60.0
_SHOWN: Final = 20
"""Maximum number of listed hours; --json lists all."""


@click.command("rollup")
@click.option("--rebuild", is_flag=True, help="Recompute all hours; pruned hours are kept.")
@click.option("--verify", is_flag=True, help="Compare the rollups with the rows; change nothing.")
@options.dsn
@options.as_json
def command(dsn: str | None, rebuild: bool, verify: bool, as_json: bool) -> None:
    """Refresh the rollups of hours with new rows.

    The daemon also does this periodically. Answers are always exact; fresh rollups make them faster. --verify
    finds rows that were modified outside the loader, and --rebuild counts them.

    \b
    Examples:
      loader rollup
      loader rollup --verify
      loader rollup --rebuild
    """
    from loader.load import database

    if rebuild and verify:
        raise UsageError("--rebuild and --verify are mutually exclusive: give only one of them")
    with database.connect(settings.database_dsn(dsn)) as connection:
        if verify:
            _verify(connection, as_json=as_json)
        else:
            _refresh(connection, rebuild=rebuild, as_json=as_json)


def _refresh(connection: Connection, *, rebuild: bool, as_json: bool) -> None:
    from loader.cli.loading import INTERRUPTED, only_for
    from loader.load import rollups
    from loader.service.signals import until_signal

    with until_signal() as signals, only_for("the owner of the tables, or the loader's role"):
        if rebuild:
            rollups.rebuild(connection)
        done = rollups.refresh_patiently(connection, signals.stop.is_set, _PATIENCE_SECONDS)
        touched = rollups.touched(connection)
    if as_json:
        terminal.print_json({"computed": done, **touched.facts()})
    else:
        terminal.say(f"computed {done} hours and days; {touched.hours} hours have not ended yet")
    if signals.stop.is_set():
        raise LoaderError(INTERRUPTED)


def _verify(connection: Connection, *, as_json: bool) -> None:
    from loader.load import rollups

    found = rollups.differences(connection)
    if as_json:
        names = ("source", "hour", "in_rows", "in_rollup")
        terminal.print_json({"differences": [dict(zip(names, row, strict=True)) for row in found]})
    else:
        for source, hour, in_rows, in_rollup in found[:_SHOWN]:
            terminal.say(f"{hour} {source}: {in_rows} in rows, {in_rollup} in the rollup")
        if not found:
            terminal.say("the rollups match the rows")
    if found:
        raise LoaderError(
            f"{len(found)} hours of the rollups do not match the rows, which were modified outside the "
            f"loader: run `loader rollup --rebuild`"
        )
