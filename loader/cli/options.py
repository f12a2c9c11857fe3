"""Options that several commands have, and the type of an age."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from spool.segment import DEFAULT_DIRECTORY

dsn = click.option(
    "--dsn", metavar="DSN",
    help="The database; else LOADER_DSN, the file LOADER_DSN_FILE, DATABASE_URL, or libpq's PG*. Other users "
    "of the machine see it: pass a password another way.",
)  # fmt: skip
spool_dir = click.option(
    "--spool-dir", metavar="DIR", type=click.Path(path_type=Path),
    help=f"The spool; else SPOOL_DIR, else {DEFAULT_DIRECTORY}.",
)  # fmt: skip
workers = click.option(
    "--workers", type=click.IntRange(1, 64), default=2, envvar="LOADER_WORKERS", show_default=True,
    help="Connections that load; else LOADER_WORKERS.",
)  # fmt: skip
archive = click.option(
    "--archive", metavar="DIR", envvar="LOADER_ARCHIVE", type=click.Path(path_type=Path, file_okay=False),
    help="Where loaded files are kept, compressed, in a directory for each day; else LOADER_ARCHIVE.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="For machines: JSON.")


class Age(click.ParamType[timedelta]):
    """An age such as `90d`: a number and y, w, d, h or m for years (of 365 days), weeks, days, hours or minutes."""

    name = "age"
    _UNITS: Final = {
        "y": timedelta(days=365), "w": timedelta(weeks=1), "d": timedelta(days=1), "h": timedelta(hours=1),
        "m": timedelta(minutes=1),
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the age; which moment that is depends on the server's clock."""
        parts = re.fullmatch(r"(\d{1,6})([ywdhm])", str(value))
        if parts is None:
            self.fail(
                f"{value!r} is not an age: write a number and y, w, d, h or m, such as 90d.", param, ctx
            )
        try:
            age = int(parts[1]) * self._UNITS[parts[2]]
            datetime.now(UTC) - age
        except OverflowError:
            self.fail(f"{value!r} is before the year 1.", param, ctx)
        return age
