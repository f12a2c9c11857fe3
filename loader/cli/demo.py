"""`loader demo`."""

from __future__ import annotations

from pathlib import Path

import click

from loader import extras, settings
from loader.cli import terminal
from loader.errors import LoaderError
from loader.service.signals import interrupted_by_hangup


@click.command("demo")
@click.option("--dsn", metavar="DSN", help="A database to use; else a temporary embedded one.")
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the page goes; else a temporary file.",
)
@click.option(
    "--keep", is_flag=True, help="Keep the server, the application, the loader and the page until Ctrl-C."
)
def command(dsn: str | None, html: Path | None, keep: bool) -> None:
    """Run the whole pipeline against a temporary Postgres.

    An application serves traffic, one of its workers is killed, and the loader loads what it left. Then two
    months of synthetic history are loaded, unless the database was given, and a page shows the last of them.

    \b
    Examples:
      loader demo
      loader demo --keep
    """
    extras.require(("fastapi", "httpx", "uvicorn", "jinja2", "vl_convert"), "demo")
    from loader.demo import tour  # imports them

    with interrupted_by_hangup():
        given = settings.database_dsn(dsn) if dsn else None
        holds = tour.run(given, terminal.console(), html, keep=keep)
    if not holds:
        raise LoaderError("the demo's sums do not hold: see above")
