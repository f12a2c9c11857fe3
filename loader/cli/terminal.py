"""Output for people: tables, facts and progress bars, with all control characters escaped.

rich is imported only when needed: its import takes longer than most commands take to run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TextIO

import click

from loader.errors import one_line
from loader.service import journal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from loader.operate.backfill import GivenFile

_NO_EDGE: Final = 1000
"""Columns of output that is not a terminal: a truncated name would be useless for the next command."""
_STYLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "": {}, "bold": {"bold": True}, "dim": {"dim": True},
    "green": {"fg": "green"}, "yellow": {"fg": "yellow"}, "red": {"fg": "red"},
}  # fmt: skip


def say(text: str, style: str = "") -> None:
    """Print one line."""
    line = _encodable(one_line(text), sys.stdout)
    click.echo(click.style(line, **_STYLES[style]) if style else line)


def warn(text: str) -> None:
    """Print one line to standard error."""
    click.echo(journal.prefix(logging.WARNING) + _encodable(one_line(text), sys.stderr), err=True)


def _encodable(text: str, stream: TextIO) -> str:
    """Escape characters that the stream's encoding lacks; click would write UTF-8 to an ASCII stream."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_json(facts: Any) -> None:
    """Print one JSON object in ASCII, so that all control characters are escaped."""
    click.echo(json.dumps(facts, default=str))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings."""
    from rich.table import Table
    from rich.text import Text

    shown = Table()
    for heading in headings:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(one_line(str(value))) for value in row))
    console().print(shown)


def facts(title: str, values: Mapping[str, object]) -> None:
    """Print names and values."""
    say(title, "bold")
    width = max(map(len, values), default=0)
    for name, value in values.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        say(f"  {name.replace('_', ' '):<{width}}  {'-' if text in (None, '') else text}")


def counts(values: Mapping[str, object]) -> str:
    """Return names and values in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


@contextlib.contextmanager
def bar(what: str, total: int, *, of_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal. Yields a function to be called with the amount that is done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with _progress(of_bytes=of_bytes) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextlib.contextmanager
def bar_over(files: Sequence[GivenFile]) -> Iterator[None]:
    """Show a progress bar over the bytes of files as they are read."""
    if not sys.stderr.isatty():
        yield
        return
    with _progress(of_bytes=True) as progress:
        task = progress.add_task("reading", total=sum(file.size() for file in files))
        for file in files:
            file.wrap = lambda stream: progress.wrap_file(stream, task_id=task)
        yield


def console(*, stderr: bool = False) -> Console:
    """Return rich's console for standard output or standard error."""
    from rich.console import Console

    width = None if stderr or sys.stdout.isatty() else _NO_EDGE
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width)


def _progress(*, of_bytes: bool) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=console(stderr=True))
