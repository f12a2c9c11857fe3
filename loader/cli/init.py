"""`loader init`."""

from __future__ import annotations

import click

from loader import settings
from loader.cli import options, terminal
from loader.cli.loading import only_for
from loader.load import database, indexes, schema


@click.command("init")
@options.dsn
@click.option(
    "--no-foreign-keys", is_flag=True,
    help="Leave out those to auth.users and family_units: they slow the load, turn an event of a deleted "
    "user into a reject, and keep a user with events from being deleted.",
)  # fmt: skip
@click.option(
    "--role", metavar="NAME",
    help="A least-privilege role (SELECT and INSERT) for the loader, created if it does not exist.",
)  # fmt: skip
@click.option(
    "--reader", metavar="NAME",
    help="A role for dashboards and analysts (SELECT, the questions, statements of at most 30 s), created "
    "if it does not exist.",
)  # fmt: skip
@options.as_json
def command(
    dsn: str | None, no_foreign_keys: bool, role: str | None, reader: str | None, as_json: bool
) -> None:
    """Create or upgrade the tables; idempotent.

    \b
    Examples:
      loader init
      loader init --role analytics_loader
    """
    actor = "the owner of the database, or a role that may create tables and roles in it"
    with only_for(actor), database.connect(settings.database_dsn(dsn)) as connection:
        before = schema.schema_version(connection)
        schema.apply_schema(connection, foreign_keys=not no_foreign_keys, role=role, reader=reader)
        now = schema.schema_version(connection)
        connection.commit()
        indexes.build(connection)
    if as_json:
        terminal.print_json({"version": now, "before": before, "role": role, "reader": reader})
    else:
        upgraded = f", upgraded from version {before}" if 0 < before < now else ""
        terminal.say(f"The tables are ready: version {now}{upgraded}.")
