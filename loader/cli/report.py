"""`loader report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from loader import extras, settings
from loader.cli import answers, options, terminal
from loader.errors import UsageError
from loader.see.catalogue import FUNNEL, MOST_STEPS
from loader.see.period import period

if TYPE_CHECKING:
    from loader.see.report import Report

_NEEDED: Final = ("jinja2", "vl_convert")


@click.command("report")
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a self-contained HTML page to this file.",
)
@click.option(
    "--funnel",
    "steps",
    default=",".join(FUNNEL),
    show_default=True,
    metavar="A,B,C",
    help="The steps of the funnel, separated by commas.",
)
@answers.since("28d")
@answers.until
@answers.tz
@options.dsn
@options.as_json
def command(
    html: Path | None, steps: str, since: str, until: str, tz: str, dsn: str | None, as_json: bool
) -> None:  # fmt: skip
    """Summarize the loaded data, in the terminal or as a page.

    The page has no scripts and makes no requests, so it can be mailed, printed and archived.

    \b
    Examples:
      loader report
      loader report --html report.html --tz America/New_York --funnel feed_viewed,memory_viewed
    """
    from loader.see import questions, report, tables
    from loader.see.whole import whole_file

    when, named = period(since, until, tz), _steps(steps)
    if html is not None:
        extras.require(_NEEDED, "report")
    with questions.reading(settings.database_dsn(dsn)) as connection:
        made = report.gather(connection, when, named)
        unknown = list(questions.unknown_types(connection, named if named != FUNNEL else ()))
    if html is not None:
        from loader.see import page  # imports the modules of the extra

        with whole_file(html) as file:
            file.write(page.render(made).encode())
    if as_json:
        terminal.print_json(tables.report_facts(made) | {"html": html and str(html)})
    else:
        _summarize(made)
        if html is not None:
            terminal.say(f"page: {html}")
    for sentence in unknown:
        terminal.warn(sentence)


def _steps(text: str) -> Sequence[str]:
    steps = tuple(step.strip() for step in text.split(","))
    if not all(steps) or len(steps) > MOST_STEPS:
        raise UsageError(f'--funnel "{text}" is not a list of 1 to {MOST_STEPS} event types: write a,b,c')
    return steps


def _summarize(made: Report) -> None:
    from loader.see import tables

    for title, table in tables.summary(made, answers.width()):
        terminal.say(title, "bold")
        answers.print_table(table)
