"""`loader tail`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click

from loader import settings
from loader.cli import options, terminal
from loader.errors import UsageError

POLL_SECONDS: Final = 0.2


@click.command("tail")
@options.spool_dir
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=10, show_default=True, help="Number of lines."
)
@click.option(
    "-f", "--follow", is_flag=True, help="Print new lines as they are emitted, until SIGTERM or Ctrl-C."
)
@click.option(
    "--type", "names", metavar="NAME", multiple=True, help="Only events or metrics of this name; repeatable."
)  # fmt: skip
@click.option("--user", metavar="UUID", help="Only events of this user.")
def command(
    spool_dir: Path | None, lines: int, follow: bool, names: tuple[str, ...], user: str | None
) -> None:
    """Print the last lines of the spool, including open segments.

    Each line is a JSON object, as it was emitted. Nothing is changed, and no database is needed.

    \b
    Examples:
      loader tail
      loader tail --type memory_posted --type feed_viewed
      loader tail -n 100 --user 0190163d-8694-739b-aea5-966c26f8ad91
    """
    from loader.operate.tail import Tail, wanted
    from loader.service.signals import until_signal
    from spool.record import canonical_uuid

    if user is not None and canonical_uuid(user) is None:
        raise UsageError(f'--user must be a UUID, not "{user}"; spool.analytics_uuid makes one from a key')
    tail = Tail(settings.spool_directory(spool_dir), wanted(names, user))
    with contextlib.closing(tail):
        try:
            _print(tail.last_lines(lines))
            if follow:
                with until_signal() as signals:
                    while not signals.stop.wait(POLL_SECONDS):
                        _print(tail.new_lines())
        except BrokenPipeError:  # such as `loader tail -f | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print(lines: Iterable[bytes]) -> None:
    for line in lines:
        if (
            sys.stdout.isatty()
        ):  # which would interpret control characters that JSON may contain, such as U+009B
            terminal.say(line.decode(errors="backslashreplace").removesuffix("\n"))
        else:
            sys.stdout.buffer.write(line)
    sys.stdout.flush()
