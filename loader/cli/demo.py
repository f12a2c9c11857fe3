"""`loader demo`."""

from __future__ import annotations

from importlib.util import find_spec

import click

from loader import settings
from loader.cli import terminal
from loader.errors import LoaderError
from loader.service.signals import interrupted_by_hangup


@click.command("demo")
@click.option("--dsn", metavar="DSN", help="A database to use; else a temporary embedded one.")
def command(dsn: str | None) -> None:
    """Run the whole pipeline against a temporary Postgres.

    An application serves traffic, one of its workers is killed, and the loader loads what it left.

    \b
    Examples:
      loader demo
    """
    for needed in ("fastapi", "httpx", "uvicorn"):
        if find_spec(needed) is None:
            raise LoaderError(f"{needed} is not installed: pip install 'analytics-spool[demo]'")
    from loader.demo import tour  # imports them

    with interrupted_by_hangup():
        holds = tour.run(settings.database_dsn(dsn) if dsn else None, terminal.console())
    if not holds:
        raise LoaderError("the demo's sums do not hold: see above")
