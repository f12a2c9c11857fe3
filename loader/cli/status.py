"""`loader status`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal, units
from loader.errors import LoaderError

if TYPE_CHECKING:
    from loader.load.rollups import Touched
    from loader.operate.status import Ledger


@click.command("status")
@options.dsn
@options.spool_dir
@options.as_json
def command(dsn: str | None, spool_dir: Path | None, as_json: bool) -> None:
    """Show the backlog, the loaded rows and the rejects.

    Touched hours have rows that are not in the rollups yet; answers read these hours from the rows.

    \b
    Examples:
      loader status
      loader status --json
    """
    import psycopg

    from loader.load import database
    from loader.load.sqlstate import explain
    from loader.operate import status

    spool = status.spool(settings.spool_directory(spool_dir))
    failure: LoaderError | None = None
    ledger: Ledger | None = None
    touched: Touched | None = None
    try:
        with database.connect(settings.database_dsn(dsn)) as connection, database.transaction(connection):
            ledger, touched = status.ledger(connection), status.touched(connection)
    except (psycopg.Error, LoaderError) as error:
        failure = explain(error)
    facts = {
        "spool": asdict(spool),
        "database": ledger and ledger.facts(),
        "rollups": touched and touched.facts(),
    }
    if as_json:
        terminal.print_json(facts | {"error": failure and str(failure)})
    else:
        for title, section in facts.items():
            if section:
                terminal.facts(title, units.readable(section))
    if failure:
        raise failure
