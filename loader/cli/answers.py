"""Code shared by `ask`, `report` and `export`: range options, and answers on standard output."""

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
    help="The time zone of days and dates, such as Europe/Berlin; default: LOADER_TZ.",
)  # fmt: skip
until = click.option(
    "--until", default="now", show_default=True, metavar="WHEN", help="End of the range (excluded)."
)


def since(default: str) -> Callable[[Function], Function]:
    """Return the option for the beginning of a range."""
    return click.option(
        "--since", default=default, show_default=True, metavar="WHEN",
        help="Beginning of the range: a date, a time, or an age such as 28d or 24h.",
    )  # fmt: skip


def question(default: str) -> Callable[[Function], Function]:
    """Return a decorator that adds the options common to all questions; `default` is the beginning of the range."""
    as_csv = click.option("--csv", "as_csv", is_flag=True, help="Print CSV with a header.")

    def decorate(function: Function) -> Function:
        added = (since(default), until, tz, options.dsn, options.as_json, as_csv)
        return functools.reduce(lambda each, option: option(each), reversed(added), function)

    return decorate


def print_json(answer: Answer) -> None:
    """Print one object: the question, its range, and the rows with column names."""
    from loader.see import figures, tables

    where = answer.period.zone
    head = {
        "question": answer.question, "since": figures.plain(answer.period.since, where),
        "until": figures.plain(answer.period.until, where), "tz": answer.period.tz,
    }  # fmt: skip
    terminal.print_json({**head, "rows": tables.rows(answer)})


def print_csv(answer: Answer) -> None:
    """Print a header and the rows as CSV."""
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
    # Control characters are escaped for a terminal; a file gets the unchanged text.
    return one_line(value) if isinstance(value, str) and sys.stdout.isatty() else value


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal; in a file or a pipe without colours and trailing blanks."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else terminal.console().width)
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    sys.stdout.write("\n".join(line if console.is_terminal else line.rstrip() for line in lines) + "\n")


def print_note(text: str) -> None:
    """Print a note below a table, word-wrapped on a terminal."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(one_line(text), style="dim"))
    else:
        terminal.say(text)


def width() -> int:
    """Return the width of the terminal in columns."""
    return terminal.console().width
