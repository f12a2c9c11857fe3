"""What a person sees: tables, facts and progress bars, with nothing in them that a terminal would obey."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from loader.errors import one_line
from loader.operate.backfill import GivenFile

_NO_EDGE: Final = 1000
"""Columns of what is no terminal: a name that is cut can't be given to the next command."""
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _NO_EDGE)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """Print one line."""
    out.print(Text(one_line(text), style=style))


def warn(text: str) -> None:
    """Print one line to standard error."""
    err.print(Text(one_line(text)))


def print_json(facts: Any) -> None:
    """Print one JSON object, in ASCII, so that no control character is raw."""
    out.print(Text(json.dumps(facts, default=str)))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings."""
    shown = Table()
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(one_line(str(value))) for value in row))
    out.print(shown)


def facts(title: str, values: Mapping[str, object]) -> None:
    """Print names and values."""
    shown = Table(title=title, show_header=False, title_justify="left")
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in values.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        shown.add_row(name.replace("_", " "), Text(one_line("-" if text in (None, "") else str(text))))
    out.print(shown)


def counts(values: Mapping[str, object]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


@contextlib.contextmanager
def bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; what is given is told how much is done."""
    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    with _progress(amount) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def bar_over(files: Sequence[GivenFile]) -> Iterator[None]:
    """Show a progress bar over the bytes of files as they are read."""
    with _progress(DownloadColumn()) as progress:
        task = progress.add_task("reading", total=sum(file.size() for file in files))
        for file in files:
            file.wrap = lambda stream: progress.wrap_file(stream, task_id=task)
        yield


def _progress(amount: DownloadColumn | MofNCompleteColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=err, disable=not err.is_terminal)
