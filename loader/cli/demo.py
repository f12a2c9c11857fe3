"""`loader demo`."""

from __future__ import annotations

from pathlib import Path

import click

from loader import extras, settings
from loader.cli import terminal
from loader.errors import LoaderError
from loader.service.signals import interrupted_by_hangup


@click.command("demo")
@click.option("--dsn", metavar="DSN", help="The database to use; default: a temporary embedded one.")
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file for the page; default: a temporary file.",
)
@click.option(
    "--keep", is_flag=True, help="Keep the server, application, loader and page running until Ctrl-C."
)
def command(dsn: str | None, html: Path | None, keep: bool) -> None:
    """Run the whole pipeline against a temporary Postgres.

    An application serves traffic, one of its workers is killed, and the loader loads all events, also those
    of the killed worker. Then two months of synthetic history are loaded (unless --dsn is given), and a
    report page shows the last month.

    \b
    Examples:
      loader demo
      loader demo --keep
    """
    extras.require(("fastapi", "httpx", "uvicorn", "jinja2", "vl_convert"), "demo")
    from loader.demo import tour  # imports the modules of the extra

    with interrupted_by_hangup():
        given = settings.database_dsn(dsn) if dsn else None
        holds = tour.run(given, terminal.console(), html, keep=keep)
    if not holds:
        raise LoaderError("the demo's counts do not add up: see above")
