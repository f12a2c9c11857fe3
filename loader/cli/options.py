"""Options shared by several commands, and the parameter types for ages and people."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import click

from spool.record import canonical_uuid
from spool.segment import DEFAULT_DIRECTORY

dsn = click.option(
    "--dsn", metavar="DSN",
    help="The database; default: LOADER_DSN, the file LOADER_DSN_FILE, DATABASE_URL, or libpq's PG*. "
    "Other users of the machine can see this argument: do not put a password in it.",
)  # fmt: skip
spool_dir = click.option(
    "--spool-dir", metavar="DIR", type=click.Path(path_type=Path),
    help=f"The spool; default: SPOOL_DIR, or {DEFAULT_DIRECTORY}.",
)  # fmt: skip
workers = click.option(
    "--workers", type=click.IntRange(1, 64), default=2, envvar="LOADER_WORKERS", show_default=True,
    help="Number of loading connections; default: LOADER_WORKERS.",
)  # fmt: skip
archive = click.option(
    "--archive", metavar="DIR", envvar="LOADER_ARCHIVE", type=click.Path(path_type=Path, file_okay=False),
    help="Directory for loaded files, compressed, with a subdirectory per day; default: LOADER_ARCHIVE.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Age(click.ParamType[timedelta]):
    """An age such as `90d`: a number and y, w, d, h or m for years (of 365 days), weeks, days, hours or minutes."""

    name = "age"
    _UNITS: Final = {
        "y": timedelta(days=365), "w": timedelta(weeks=1), "d": timedelta(days=1), "h": timedelta(hours=1),
        "m": timedelta(minutes=1),
    }  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the age; the server's clock decides which moment it denotes."""
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


class Person(click.ParamType[UUID]):
    """The UUID of a person or a family, in any of its forms."""

    name = "uuid"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> UUID:
        """Return the UUID."""
        text = canonical_uuid(str(value))
        if text is None:
            self.fail(
                f"{value!r} is not a UUID; of an id that your application counts, it is analytics_uuid('user', '42') "
                "in SQL.", param, ctx,
            )  # fmt: skip
        if not UUID(text).int:
            self.fail("the UUID of zeros is nobody's: it replaces mentions.", param, ctx)
        return UUID(text)
