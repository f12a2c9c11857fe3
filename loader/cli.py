"""The command line: each command parses, calls and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

import click
import orjson
import psycopg
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loader import backfill as given_files
from loader import daemon, database, rejects, settings
from loader import status as standing
from loader.errors import SOME_REJECTED, LoaderError, UsageError
from loader.load import Tally
from loader.load import retry as retry_file
from loader.workers import Report, Workers, explain

PATIENCE: Final = 60.0
"""Seconds that a command which ends by itself waits for a database that went away under it."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns what ends a command into one line and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except click.Abort:
            _fail("interrupted", 1)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "loader"
            _fail(f"{error.format_message()} See `{command} --help`.", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except psycopg.Error as error:
            _fail(str(explain(error)), explain(error).exit_code)
        except (LoaderError, OSError, ValueError) as error:
            _fail(str(error), getattr(error, "exit_code", LoaderError.exit_code))


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {_plain(message)}", err=True)
    sys.exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="analytics-spool")
def cli() -> None:
    """Load analytics spools into Postgres.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 done but some lines were rejected, 4 database out of reach.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("loader").setLevel(logging.INFO)


def _dsn_option(command: Command) -> Command:
    return click.option(
        "--dsn", metavar="DSN", help="The database; else LOADER_DSN, DATABASE_URL, or libpq's PG*."
    )(command)


def _spool_option(command: Command) -> Command:
    return click.option(
        "--spool-dir", metavar="DIR", type=click.Path(path_type=Path),
        help=f"The spool; else SPOOL_DIR, else {settings.DEFAULT_SPOOL}.",
    )(command)  # fmt: skip


def _workers_option(command: Command) -> Command:
    return click.option(
        "--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Connections that load."
    )(command)


@cli.command()
@_dsn_option
@click.option(
    "--no-foreign-keys", is_flag=True,
    help="Leave out those to auth.users and family_units: they slow the load, make an event of a deleted "
    "user a reject, and keep a user with events from being deleted.",
)  # fmt: skip
@click.option(
    "--role", metavar="NAME",
    help="A role for the loader, made where it is missing: it may add and read rows, and nothing else.",
)  # fmt: skip
def init(dsn: str | None, no_foreign_keys: bool, role: str | None) -> None:
    """Apply schema.sql, also to tables of an older version; safe to repeat."""
    with database.connect(settings.database_dsn(dsn)) as connection:
        before = database.schema_version(connection)
        database.apply_schema(connection, foreign_keys=not no_foreign_keys, role=role)
        now = database.schema_version(connection)
    since = f", they were of version {before}" if 0 < before < now else ""
    out.print(f"The tables are ready: version {now}{since}.")


@cli.command()
@_dsn_option
@_spool_option
@_workers_option
@click.option("--once", is_flag=True, help="Load what is there, segments of dead writers too, and exit.")
def run(dsn: str | None, spool_dir: Path | None, workers: int, once: bool) -> None:
    """Watch a spool and load what is sealed, until SIGTERM."""
    where = settings.database_dsn(dsn)
    spool = settings.spool_directory(spool_dir)
    with _until_signal() as stop:
        if not once:
            with contextlib.closing(Workers(where, spool, workers, stop)) as pool:
                daemon.run(spool, pool, stop)
            return
        with daemon.exclusive(spool), contextlib.closing(_patient(where, spool, workers, stop)) as pool:
            found, report = daemon.once(spool, pool)
        for name, why in found.skipped.items():
            err.print(_plain(f"not touched: {name}: {why}"))
        _finish(report, stop)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@_dsn_option
@_spool_option
@_workers_option
@click.option("--dry-run", is_flag=True, help="Read and check every line, without a database.")
def backfill(
    paths: tuple[str, ...], dsn: str | None, spool_dir: Path | None, workers: int, dry_run: bool
) -> None:
    """Load files, directories, or - for standard input; .gz and .zst too.

    The files are never changed. Lines that can't be loaded go to the spool's rejected/.
    """
    files = given_files.find(paths)
    if dry_run:
        with _progress(files):
            checked = given_files.dry_run(files)
        _print_counts("would be rejected", checked.codes)
        _finish(Report(checked.tally, len(files) - len(checked.failures), checked.failures))
        return
    where, spool = settings.database_dsn(dsn), settings.spool_directory(spool_dir)
    with _until_signal() as stop, contextlib.closing(_patient(where, spool, workers, stop)) as pool:
        with _progress(files):
            report = pool.load(files)
        _finish(report, stop)


@cli.command()
@_dsn_option
@_spool_option
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def status(dsn: str | None, spool_dir: Path | None, as_json: bool) -> None:
    """Show what waits, what was loaded and what was rejected."""
    backlog = standing.backlog(settings.spool_directory(spool_dir))
    failure: LoaderError | None = None
    ledger: standing.Ledger | None = None
    try:
        with database.connect(settings.database_dsn(dsn)) as connection:
            ledger = standing.ledger(connection)
    except psycopg.Error as error:
        failure = explain(error)
    except LoaderError as error:
        failure = error
    facts = {"spool": dataclasses.asdict(backlog), "database": ledger and dataclasses.asdict(ledger)}
    if as_json:
        click.echo(json.dumps(facts | {"error": failure and str(failure)}, default=str))
    else:
        for title, section in facts.items():
            if section:
                _print_facts(title, section)
    if failure:
        raise failure


@cli.group("rejects")
def rejects_commands() -> None:
    """Look at the lines that were not loaded, and try them again."""


@rejects_commands.command("list")
@_spool_option
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object per file.")
def list_rejects(spool_dir: Path | None, as_json: bool) -> None:
    """List the reject files with their counts by reason."""
    table = Table("file", "lines", "codes")
    for path in rejects.files(settings.spool_directory(spool_dir)):
        codes = rejects.count([path])
        if as_json:
            click.echo(json.dumps({"file": path.name, "lines": codes.total(), "codes": codes}))
        named = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        table.add_row(_plain(path.name), str(codes.total()), _plain(named))
    if not as_json:
        out.print(table if table.row_count else "No rejects.")


@rejects_commands.command("show")
@click.argument("names", nargs=-1, metavar="[FILE...]")
@_spool_option
@click.option("--json", "as_json", is_flag=True, help="For machines: the reject lines as they are.")
def show_rejects(names: tuple[str, ...], spool_dir: Path | None, as_json: bool) -> None:
    """Show each rejected line with its place and reason."""
    for path in _reject_files(settings.spool_directory(spool_dir), names):
        for rejected in rejects.read(path):
            if as_json:
                click.echo(json.dumps(orjson.loads(rejected.encode())))  # in ASCII
                continue
            out.print(Text(_plain(f"{rejected.file}, line {rejected.line}: {rejected.code}"), style="bold"))
            out.print(Text(_plain(f"  {rejected.reason}")))
            out.print(Text(_plain(f"  {rejected.raw[:2000].decode(errors='backslashreplace')}"), style="dim"))


@rejects_commands.command("retry")
@click.argument("names", nargs=-1, metavar="[FILE...]")
@_dsn_option
@_spool_option
def retry_rejects(names: tuple[str, ...], dsn: str | None, spool_dir: Path | None) -> None:
    """Load the rejected lines that have become loadable; the others stay."""
    where = settings.database_dsn(dsn)
    report = Report()
    with database.connect(where) as connection:
        for path in _reject_files(settings.spool_directory(spool_dir), names):
            report.tally += retry_file(connection, path)
            report.files += 1
    _finish(report)


@cli.command()
@click.option("--dsn", metavar="DSN", help="A database to use; else an embedded one that is thrown away.")
def demo(dsn: str | None) -> None:
    """Show it all: a throw-away Postgres, an application's traffic, a SIGKILL, the loader, what arrived."""
    for needed in ("fastapi", "httpx", "uvicorn"):
        if find_spec(needed) is None:
            raise LoaderError(f"{needed} is not installed: pip install 'analytics-spool[embedded]'")
    from loader import demo as tour

    if not tour.run(settings.database_dsn(dsn) if dsn else None, out):
        raise LoaderError("the demo's sums do not hold: see above")


def _patient(dsn: str, spool: Path, count: int, stop: threading.Event) -> Workers:
    """Workers for a command that ends by itself: a database that is not there at all is told at once."""
    database.connect(dsn).close()
    return Workers(dsn, spool, count, stop, PATIENCE)


@contextlib.contextmanager
def _until_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; the second Ctrl-C ends at once."""
    stop = threading.Event()

    def handler(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextlib.contextmanager
def _progress(files: list[given_files.GivenFile]) -> Iterator[None]:
    """A bar over the bytes of the files, on a terminal alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("reading", total=sum(file.size() for file in files))
        for file in files:
            file.wrap = lambda stream: progress.wrap_file(stream, task_id=task)
        yield


def _reject_files(spool: Path, names: tuple[str, ...]) -> list[Path]:
    files = rejects.files(spool)
    known = {path.name for path in files}
    for name in names:
        if Path(name).name not in known:
            raise UsageError(f"{spool / rejects.DIRECTORY} has no {name}: see `loader rejects list`")
    wanted = {Path(name).name for name in names}
    return [path for path in files if not names or path.name in wanted]


def _finish(report: Report, stop: threading.Event | None = None) -> None:
    """Print what was done and end with the exit code that says it."""
    tally: Tally = report.tally
    out.print(
        f"files {report.files}, lines {tally.lines + tally.known}: "
        f"events {tally.events}, metrics {tally.metrics}, duplicates {tally.duplicates}, "
        f"rejected {tally.rejected}, known {tally.known}"
    )
    for name, why in report.failures.items():
        err.print(_plain(f"{name} {why}"))
    if stop is not None and stop.is_set():
        raise LoaderError("interrupted: what is counted above is loaded; run it again to go on")
    if report.failures:
        raise LoaderError(f"{len(report.failures)} files were not loaded whole")
    if tally.rejected:
        sys.exit(SOME_REJECTED)


def _print_facts(title: str, facts: Mapping[str, object]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        table.add_row(name.replace("_", " "), _plain("-" if shown in (None, "") else str(shown)))
    out.print(table)


def _print_counts(title: str, counts: Mapping[str, int]) -> None:
    for code, count in sorted(counts.items()):
        out.print(f"{title}: {count} {code}")


def _plain(text: str) -> str:
    """Text from outside, in one line and without anything a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
