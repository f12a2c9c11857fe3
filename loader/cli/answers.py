"""What `ask`, `report` and `export` have in common: options of a range, and answers on standard output."""

from __future__ import annotations

import csv
import functools
import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loader.cli import options, terminal
from loader.errors import one_line

if TYPE_CHECKING:
    from rich.table import Table

    from loader.see.questions import Answer

Function = TypeVar("Function", bound=Callable[..., None])

tz = click.option(
    "--tz", default="UTC", envvar="LOADER_TZ", show_default=True, metavar="ZONE",
    help="The time zone of days and dates, such as Europe/Berlin; else LOADER_TZ.",
)  # fmt: skip
until = click.option(
    "--until", default="now", show_default=True, metavar="WHEN", help="Up to this moment, exclusively."
)


def since(default: str) -> Callable[[Function], Function]:
    """The option of the beginning of a range."""
    return click.option(
        "--since", default=default, show_default=True, metavar="WHEN",
        help="From a date, a time, or an age such as 28d or 24h.",
    )  # fmt: skip


def question(default: str) -> Callable[[Function], Function]:
    """The options of every question; `default` is the beginning of its range."""
    as_csv = click.option("--csv", "as_csv", is_flag=True, help="For machines: CSV with a header.")

    def decorate(function: Function) -> Function:
        added = (since(default), until, tz, options.dsn, options.as_json, as_csv)
        return functools.reduce(lambda each, option: option(each), reversed(added), function)

    return decorate


def print_json(answer: Answer) -> None:
    """Print one object: the question, its range, and the rows by the names of their columns."""
    from loader.see import figures, tables

    where = answer.period.zone
    head = {
        "question": answer.question, "since": figures.plain(answer.period.since, where),
        "until": figures.plain(answer.period.until, where), "tz": answer.period.tz,
    }  # fmt: skip
    terminal.print_json({**head, "rows": tables.rows(answer)})


def print_csv(answer: Answer) -> None:
    """Print a header and the rows."""
    from loader.see import tables

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(answer.columns)
    for row in tables.rows(answer):
        writer.writerow(map(_cell, row.values()))
    sys.stdout.write(text.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return json.dumps(value)
    # A terminal gets nothing that it would obey; a file gets the text as it is.
    return one_line(value) if isinstance(value, str) and sys.stdout.isatty() else value


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; into a file or a pipe without colours and trailing blanks."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else terminal.console().width)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    sys.stdout.write("\n".join(line if console.is_terminal else line.rstrip() for line in lines) + "\n")


def print_note(text: str) -> None:
    """Print a remark below a table, wrapped between words on a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(one_line(text), style="dim"))
    else:
        terminal.say(text)


def width() -> int:
    """Columns of the terminal."""
    return terminal.console().width
