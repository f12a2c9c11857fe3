"""`loader init`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal

if TYPE_CHECKING:
    from loader.load import schema


@click.command("init")
@options.dsn
@click.option(
    "--foreign-keys/--no-foreign-keys", default=None,
    help="Add or drop the foreign keys to auth.users and family_units; remembered; new tables have "
    "them. The keys slow loading, reject events of deleted users, and prevent the deletion of "
    "users with events.",
)  # fmt: skip
@click.option(
    "--optional-identity/--required-identity", default=None,
    help="Accept or reject events without a user or a family; remembered; new tables reject them. "
    "Emitters write such events with SPOOL_IDENTITY=optional.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["plain", "partitioned", "citus"]), default=None,
    help="Layout of new tables; remembered; default: plain. partitioned: one partition per day; the load rate stays "
    "constant as the data grows, and old data is dropped quickly. `loader migrate` converts plain tables. citus: the "
    "same, distributed over the workers of a Citus cluster; no foreign keys.",
)  # fmt: skip
@click.option(
    "--width", type=click.Choice(["day", "week", "month"]), default=None,
    help="Width of partitions created from now on; remembered; default: a day.",
)  # fmt: skip
@click.option(
    "--role", metavar="NAME",
    help="A least-privilege role (SELECT and INSERT) for the loader, created if it does not exist.",
)  # fmt: skip
@click.option(
    "--reader", metavar="NAME",
    help="A role for dashboards and analysts (SELECT, the question functions, a statement "
    "timeout of 30 s), created if it does not exist.",
)  # fmt: skip
@options.as_json
def command(
    dsn: str | None, foreign_keys: bool | None, optional_identity: bool | None,
    layout: schema.Layout | None, width: schema.Width | None, role: str | None, reader: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Create or upgrade the tables; idempotent.

    \b
    Examples:
      loader init
      loader init --role analytics_loader --reader analytics_reader
      loader init --no-foreign-keys
      loader init --optional-identity
      loader init --layout partitioned
    """
    from loader.cli.loading import only_for
    from loader.load import database, indexes, partitions, schema

    identity: schema.Identity | None = None
    if optional_identity is not None:
        identity = "optional" if optional_identity else "required"
    actor = "the owner of the database, or a role that may create tables and roles in it"
    with only_for(actor), database.connect(settings.database_dsn(dsn)) as connection:
        applied = schema.apply_schema(
            connection, foreign_keys=foreign_keys, identity=identity, layout=layout, width=width, role=role,
            reader=reader,
        )  # fmt: skip
        if made := partitions.make(connection):
            applied.notes.append(f"created {made} partitions")
        applied.notes += [f'built the index "{name}"' for name in indexes.build(connection)]
    if as_json:
        terminal.print_json(
            {"version": applied.version, "before": applied.before, "role": role, "reader": reader,
             "foreign_keys": applied.foreign_keys, "identity": applied.identity, "layout": applied.layout,
             "notes": applied.notes, "warnings": applied.warnings}
        )  # fmt: skip
        return
    upgraded = f", upgraded from version {applied.before}" if 0 < applied.before < applied.version else ""
    terminal.say(f"The tables are ready: version {applied.version}{upgraded}.")
    terminal.say(_NO_KEYS if applied.layout == "citus" else _FOREIGN_KEYS[applied.foreign_keys])
    terminal.say(_IDENTITY[applied.identity])
    terminal.say(_LAYOUT[applied.layout])
    for note in applied.notes:
        terminal.say(note)
    for warning in applied.warnings:
        terminal.warn(f"Warning: {warning}")


_FOREIGN_KEYS = {
    "on": "Foreign keys: on, if auth.users and family_units exist (--no-foreign-keys drops them).",
    "off": "Foreign keys: off, as configured (--foreign-keys adds them).",
}
_NO_KEYS = "Foreign keys: none; Citus does not support them from distributed to local tables."
_IDENTITY = {
    "required": "Identity: required (--optional-identity accepts events without a user or a family).",
    "optional": "Identity: optional, as configured (--required-identity rejects events without a user "
    "or a family).",
}
_LAYOUT = {
    "plain": "Layout: plain (`loader migrate --to partitioned` converts it).",
    "partitioned": "Layout: partitioned; the loader creates partitions for the next days.",
    "citus": "Layout: citus, partitioned and distributed by id; the loader creates partitions for the next days.",
}
