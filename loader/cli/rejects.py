"""`loader rejects list|show|retry|export|drop`."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import CompletionItem

from loader import settings
from loader.cli import options
from loader.errors import LoaderError, UsageError

if TYPE_CHECKING:
    from loader.files.rejects import Rejected

_CLAIM_SECONDS: Final = 10.0
"""Seconds to wait for a file that the daemon is retrying."""


@click.group("rejects")
def command() -> None:
    """List, show, retry, export and drop rejected lines.

    \b
    Examples:
      loader rejects list
      loader rejects show
      loader rejects retry
    """


def _complete_reject_file(ctx: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    from loader.files import rejects

    try:
        files = rejects.files(settings.spool_directory(ctx.params.get("spool_dir")))
    except (LoaderError, OSError):
        return []
    return [CompletionItem(path.name) for path in files if path.name.startswith(begun)]


_names = click.argument("names", nargs=-1, metavar="[FILE...]", shell_complete=_complete_reject_file)


@command.command("list")
@options.spool_dir
@options.as_json
def list_rejects(spool_dir: Path | None, as_json: bool) -> None:
    """List the reject files with their counts by code.

    \b
    Examples:
      loader rejects list
      loader rejects list --json
    """
    from loader.cli import terminal
    from loader.operate.status import reject_counts

    rows = []
    for path, codes in reject_counts(settings.spool_directory(spool_dir)):
        if as_json:
            terminal.print_json({"file": path.name, "lines": codes.total(), "codes": codes})
        rows.append((path.name, codes.total(), ", ".join(f"{code} {n}" for code, n in codes.most_common())))
    if rows and not as_json:
        terminal.table(("file", "lines", "codes"), rows)
    elif not as_json:
        terminal.say("No rejects.")


@command.command("show")
@_names
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Show the first N lines; default: all."
)
@options.spool_dir
@options.as_json
def show_rejects(names: tuple[str, ...], limit: int | None, spool_dir: Path | None, as_json: bool) -> None:
    """Show each rejected line with its file, line number and reason.

    \b
    Examples:
      loader rejects show
      loader rejects show --limit 10
      loader rejects show --json
    """
    import orjson

    from loader.cli import terminal

    files = _reject_files(settings.spool_directory(spool_dir), names)
    for rejected in itertools.islice(_lines(files), limit):
        if as_json:
            terminal.print_json(orjson.loads(rejected.encode()))
            continue
        terminal.say(f"{rejected.file}, line {rejected.line}: {rejected.code}", "bold")
        terminal.say(f"  {rejected.reason}")
        terminal.say(f"  {rejected.raw[:2000].decode(errors='backslashreplace')}", "dim")


def _lines(files: Sequence[Path]) -> Iterator[Rejected]:
    """Yield the rejects of the files in order. Raises OSError, ValueError."""
    from loader.files import rejects

    for path in files:
        with contextlib.suppress(FileNotFoundError):  # loaded after it was listed
            yield from rejects.read(path)


@command.command("retry")
@_names
@options.dsn
@options.spool_dir
@options.as_json
def retry_rejects(names: tuple[str, ...], dsn: str | None, spool_dir: Path | None, as_json: bool) -> None:
    """Load rejected lines that can be loaded now; the others remain rejects.

    \b
    Examples:
      loader rejects retry
    """
    from loader.cli import terminal
    from loader.cli.loading import finish
    from loader.load import database
    from loader.load.batch import retry
    from loader.service import log_format
    from loader.service.run import Report
    from loader.service.signals import until_signal

    log_format.to_stderr()
    files = _reject_files(settings.spool_directory(spool_dir), names)
    report = Report()
    with (
        until_signal() as signals,
        database.connect(settings.database_dsn(dsn)) as connection,
        terminal.bar("files", len(files)) as shown,
    ):
        for path in files:
            if signals.stop.is_set():
                break
            try:
                with _claimed(path, signals.stop) as is_ours:
                    if is_ours:
                        report.loaded += retry(connection, path)
                        report.files += 1
            except (LoaderError, OSError) as error:  # the other files can still be retried
                report.failures[path.name] = f"could not be retried: {error}"
            shown(report.files)
    finish(report, signals, as_json=as_json)


@contextlib.contextmanager
def _claimed(path: Path, stop: threading.Event) -> Iterator[bool]:
    """Claim the file for the block; yield False if it no longer exists or `stop` was set.

    Raises LoaderError if another process keeps it too long.
    """
    from loader.files.claim import claimed

    deadline = time.monotonic() + _CLAIM_SECONDS
    while not stop.is_set() and path.exists():  # otherwise the daemon has loaded all of it
        with claimed(path) as is_ours:
            if is_ours:
                yield True
                return
        if time.monotonic() > deadline:
            raise LoaderError("is being retried by another process: try again later")
        stop.wait(0.1)
    yield False


_codes = click.option(
    "--code", "codes", multiple=True, metavar="CODE", help="Only rejects with this code; repeatable."
)


@command.command("export")
@_names
@_codes
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Output file; default: standard output.",
)
@options.spool_dir
def export_rejects(
    names: tuple[str, ...], codes: tuple[str, ...], output: Path | None, spool_dir: Path | None
) -> None:
    """Write the original lines, to be repaired and loaded with `loader backfill`.

    They remain rejects until they are dropped.

    \b
    Examples:
      loader rejects export --output repair.ndjson
      loader rejects export --code invalid_name | sed s/Photo/photo/ | loader backfill -
    """
    from loader.cli import terminal
    from loader.see.whole import whole_file

    found = _lines(_reject_files(settings.spool_directory(spool_dir), names))
    wanted = (each.raw for each in found if not codes or each.code in codes)
    if output is None:
        if sys.stdout.isatty():  # which would interpret control characters in a line
            raise UsageError("standard output is a terminal: give --output FILE, or a pipe")
        for raw in wanted:
            sys.stdout.buffer.write(raw + b"\n")
        return
    lines = 0
    with whole_file(output) as file:
        for raw in wanted:
            lines += 1
            file.write(raw + b"\n")
    terminal.say(f"lines {lines}")


@command.command("drop")
@_names
@_codes
@click.option("--all", "everything", is_flag=True, help="Drop rejects of all files.")
@click.option("--yes", is_flag=True, help="Confirm that the lines are deleted permanently.")
@options.spool_dir
@options.as_json
def drop_rejects(
    names: tuple[str, ...], codes: tuple[str, ...], everything: bool, yes: bool, spool_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Delete rejected lines permanently. The ledger keeps their count.

    \b
    Examples:
      loader rejects drop --all --yes
      loader rejects drop --code invalid_json --all --yes
    """
    from loader.cli import terminal

    if everything == bool(names):
        raise UsageError("name the files whose rejects to drop (see `loader rejects list`), or give --all")
    dropped: Counter[str] = Counter()
    for path in _reject_files(settings.spool_directory(spool_dir), names):
        with _claimed(path, threading.Event()) as is_ours:
            if is_ours:
                dropped += _dropped(path, codes, remove=yes)
    counted = ", ".join(f"{code} {n}" for code, n in dropped.most_common()) or "none"
    if not yes:
        raise UsageError(
            f"{dropped.total()} lines would be deleted permanently ({counted}): add --yes to confirm"
        )
    if as_json:
        terminal.print_json({"dropped": dropped})
    else:
        terminal.say(f"dropped {dropped.total()} lines ({counted})")


def _dropped(path: Path, codes: tuple[str, ...], *, remove: bool) -> Counter[str]:
    """Delete the rejects of a file, or those with given codes, and count them. Raises OSError, ValueError."""
    from loader.files import rejects

    dropped: Counter[str] = Counter()
    if not remove:
        dropped.update(each.code for each in rejects.read(path) if not codes or each.code in codes)
        return dropped
    with rejects.replacing(path) as kept:
        for each in rejects.read(path):
            if codes and each.code not in codes:
                kept.write(each.encode())
            else:
                dropped[each.code] += 1
    return dropped


def _reject_files(spool: Path, names: tuple[str, ...]) -> list[Path]:
    from loader.files import rejects

    files = rejects.files(spool)
    known = {path.name for path in files}
    for name in names:
        if Path(name).name not in known:
            raise UsageError(f"{spool / rejects.DIRECTORY} has no {name}: see `loader rejects list`")
    wanted = {Path(name).name for name in names}
    return [path for path in files if not names or path.name in wanted]
