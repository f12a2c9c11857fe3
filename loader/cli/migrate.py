"""`loader migrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal

if TYPE_CHECKING:
    from loader.load import schema


@click.command("migrate")
@click.option(
    "--to", "layout", type=click.Choice(["partitioned"]), required=True, expose_value=False,
    help="The new layout of the tables. This cannot be undone.",
)  # fmt: skip
@click.option(
    "--width", type=click.Choice(["day", "week", "month"]), default=None,
    help="Width of partitions created from now on; remembered; default: a day.",
)  # fmt: skip
@options.dsn
@click.option("--dry-run", is_flag=True, help="Report the steps and the obstacles; change nothing.")
@options.as_json
def command(width: schema.Width | None, dsn: str | None, dry_run: bool, as_json: bool) -> None:
    """Convert plain tables to partitioned ones, while loaders and readers continue.

    The rows are not copied: the old tables become the first partitions. The command may be interrupted at any
    time; run it again to continue. If objects of your own use the tables, it lists them and changes nothing.

    \b
    Examples:
      loader migrate --to partitioned --dry-run
      loader migrate --to partitioned
      loader migrate --to partitioned --width week
    """
    from loader.cli.loading import only_for
    from loader.load import database
    from loader.operate import migrate
    from loader.operate.dependents import CannotMigrateError

    actor = "the owner of the tables"
    steps: list[str] = []
    report = steps.append if as_json else terminal.say
    with only_for(actor), database.connect(settings.database_dsn(dsn)) as connection:
        try:
            if dry_run:
                migrate.plan(connection, report)
            else:
                migrate.migrate(connection, report, width)
        except CannotMigrateError as error:
            for obstacle in error.obstacles:
                terminal.warn(str(obstacle))
            raise
    if as_json:
        terminal.print_json({"dry_run": dry_run, "steps": steps})
