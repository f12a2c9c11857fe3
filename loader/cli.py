"""The command line: each command parses, calls and prints."""

from __future__ import annotations

import contextlib
import faulthandler
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import orjson
import psycopg
from click.shell_completion import CompletionItem

from loader import backfill as given_files
from loader import daemon, database, doctor, logs, prune, rejects, screen, settings
from loader import status as standing
from loader.batches import Report
from loader.errors import SOME_REJECTED, LoaderError, UsageError, one_line
from loader.health import Health
from loader.load import retry as retry_file
from loader.lock import exclusive
from loader.notify import Notifier
from loader.signals import Signals, until_signal
from loader.sqlstate import explain
from loader.watch import backlog
from loader.workers import Workers

PATIENCE: Final = 60.0
"""Seconds that a command which ends by itself waits for a database that went away under it."""
INTERRUPTED: Final = "interrupted: what is counted above is done; run it again to go on"


class _Commands(click.Group):
    """Turns what ends a command into one line and its exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted: run it again to go on", LoaderError.exit_code)
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
    click.echo(f"Error: {one_line(message)}", err=True)
    sys.exit(code)


class _Age(click.ParamType[datetime]):
    """An age as `90d`: a number and w, d, h or m for weeks, days, hours or minutes."""

    name = "age"
    _UNITS: Final = {"w": "weeks", "d": "days", "h": "hours", "m": "minutes"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        parts = re.fullmatch(r"(\d{1,6})([wdhm])", str(value))
        if parts is None:
            self.fail(f"{value!r} is no age: write a number and w, d, h or m, as 90d.", param, ctx)
        try:
            return datetime.now(UTC) - timedelta(**{self._UNITS[parts[2]]: int(parts[1])})
        except OverflowError:
            self.fail(f"{value!r} is before the year 1.", param, ctx)


_dsn_option = click.option(
    "--dsn", metavar="DSN",
    help="The database; else LOADER_DSN, the file LOADER_DSN_FILE, DATABASE_URL, or libpq's PG*. Other users "
    "of the machine see it: give a password otherwise.",
)  # fmt: skip
_spool_option = click.option(
    "--spool-dir", metavar="DIR", type=click.Path(path_type=Path),
    help=f"The spool; else SPOOL_DIR, else {settings.DEFAULT_SPOOL}.",
)  # fmt: skip
_workers_option = click.option(
    "--workers", type=click.IntRange(1, 64), default=2, envvar="LOADER_WORKERS", show_default=True,
    help="Connections that load; else LOADER_WORKERS.",
)  # fmt: skip
_archive_option = click.option(
    "--archive", metavar="DIR", envvar="LOADER_ARCHIVE", type=click.Path(path_type=Path, file_okay=False),
    help="Where loaded files are kept, compressed, in a directory for each day; else LOADER_ARCHIVE.",
)  # fmt: skip
_json_option = click.option("--json", "as_json", is_flag=True, help="For machines: JSON.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="analytics-spool")
def cli() -> None:
    """Load analytics spools into Postgres.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 done but some lines were rejected, 4 database out of reach.

    \b
    Examples:
      loader doctor
      loader init
      loader run --once
    """
    logs.to_stderr()


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
@_json_option
def init(dsn: str | None, no_foreign_keys: bool, role: str | None, as_json: bool) -> None:
    """Apply schema.sql, also to tables of an older version; safe to repeat.

    \b
    Examples:
      loader init
      loader init --role analytics_loader
    """
    who = "the owner of the database, or who may make tables and roles in it"
    with _only_for(who), database.connect(settings.database_dsn(dsn)) as connection:
        before = database.schema_version(connection)
        database.apply_schema(connection, foreign_keys=not no_foreign_keys, role=role)
        now = database.schema_version(connection)
    if as_json:
        screen.as_json({"version": now, "before": before, "role": role})
    else:
        since = f", they were of version {before}" if 0 < before < now else ""
        screen.say(f"The tables are ready: version {now}{since}.")


@cli.command()
@_dsn_option
@_spool_option
@_workers_option
@_archive_option
@click.option("--once", is_flag=True, help="Load what is there, segments of dead writers too, and exit.")
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), envvar="LOADER_METRICS_PORT",
    help="Answer Prometheus on this port of this machine; else LOADER_METRICS_PORT.",
)  # fmt: skip
@_json_option
def run(
    dsn: str | None, spool_dir: Path | None, workers: int, archive: Path | None, once: bool,
    metrics_port: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Watch a spool and load what is sealed, until SIGTERM.

    SIGHUP makes it connect anew, with the DSN as it is now. Log lines are JSON where they do not go to a
    terminal.

    \b
    Examples:
      loader run --metrics-port 9187 --archive /var/lib/analytics-archive
      loader run --once
    """
    if as_json and not once:
        raise UsageError("--json goes with --once: what the daemon says is in its log, as JSON")
    where = _dsn_of(dsn)
    spool = settings.spool_directory(spool_dir)
    if dsn and settings.has_password(dsn):
        screen.warn(
            "--dsn shows its password to everyone who lists processes: use LOADER_DSN or LOADER_DSN_FILE"
        )
    with until_signal() as signals:
        if once:
            _run_once(where, spool, workers, archive, signals, as_json)
            return
        faulthandler.enable()  # where systemd's watchdog aborts it, the journal has what each thread was at
        watching = daemon.Daemon(where, spool, workers, signals, archive, Notifier())
        if metrics_port is not None:
            from loader import metrics  # which takes a while to import

            metrics.serve(metrics_port, spool, watching.health)
        watching.run()


def _run_once(
    dsn: Callable[[], str], spool: Path, workers: int, archive: Path | None, signals: Signals, as_json: bool
) -> None:
    with exclusive(spool), screen.bar("loading", backlog(spool).sealed_bytes, of_bytes=True) as shown:
        health = Health()
        pool = _patient(dsn, spool, workers, signals, health, lambda: shown(health.tally.bytes))
        with contextlib.closing(pool):
            found, report = daemon.once(spool, pool, archive)
    for name, why in found.skipped.items():
        screen.warn(f"not touched: {name}: {why}")
    _finish(report, signals, as_json)


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(allow_dash=True))
@_dsn_option
@_spool_option
@_workers_option
@click.option("--dry-run", is_flag=True, help="Read and check every line, without a database.")
@_json_option
def backfill(
    paths: tuple[str, ...],
    dsn: str | None,
    spool_dir: Path | None,
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Load files, directories, or - for standard input; .gz and .zst too.

    The files are never changed. Lines that can't be loaded go to the spool's rejected/.

    \b
    Examples:
      loader backfill --dry-run archive/
      loader backfill archive/ older.ndjson.gz
      zcat older.ndjson.gz | loader backfill -
    """
    files = given_files.find(paths)
    if dry_run:
        with screen.bar_over(files):
            checked = given_files.dry_run(files)
        if not as_json:
            for code, count in sorted(checked.codes.items()):
                screen.say(f"would be rejected: {count} {code}")
        report = Report(checked.tally, len(files) - len(checked.failures), checked.failures)
        _finish(report, None, as_json, codes=checked.codes)
        return
    where, spool = _dsn_of(dsn), settings.spool_directory(spool_dir)
    with until_signal() as signals, contextlib.closing(_patient(where, spool, workers, signals)) as pool:
        with screen.bar_over(files):
            report = pool.load(files)
        _finish(report, signals, as_json)


@cli.command()
@_dsn_option
@_spool_option
@_json_option
def status(dsn: str | None, spool_dir: Path | None, as_json: bool) -> None:
    """Show what waits, what was loaded and what was rejected.

    \b
    Examples:
      loader status
      loader status --json
    """
    spool = standing.spool(settings.spool_directory(spool_dir))
    failure: LoaderError | None = None
    ledger: standing.Ledger | None = None
    try:
        with database.connect(settings.database_dsn(dsn)) as connection:
            ledger = standing.ledger(connection)
    except (psycopg.Error, LoaderError) as error:
        failure = explain(error)
    facts = {"spool": asdict(spool), "database": ledger and asdict(ledger)}
    if as_json:
        screen.as_json(facts | {"error": failure and str(failure)})
    else:
        for title, section in facts.items():
            if section:
                screen.facts(title, section)
    if failure:
        raise failure


@cli.command("doctor")
@_dsn_option
@_spool_option
@_archive_option
@_json_option
def examine(dsn: str | None, spool_dir: Path | None, archive: Path | None, as_json: bool) -> None:
    """Look at all that the loader needs, and say what is wrong and what to type. Changes nothing.

    Run it as the user that loads: `sudo -u analytics loader doctor`.

    \b
    Examples:
      loader doctor
      loader doctor --json
    """
    findings = list(doctor.examine(spool_dir, dsn, archive))
    if as_json:
        screen.as_json([finding.facts() for finding in findings])
    for finding in () if as_json else findings:
        style = {doctor.Verdict.OK: "green", doctor.Verdict.WARNING: "yellow"}.get(finding.verdict, "red")
        screen.say(f"{finding.verdict:<8} {finding.check:<11} {finding.finding}", style)
        if finding.remedy:
            screen.say(f"{'':20} do: {finding.remedy}")
    failed = [finding for finding in findings if finding.verdict is doctor.Verdict.FAILED]
    if failed:
        error = LoaderError(f"failed: {', '.join(dict.fromkeys(finding.check for finding in failed))}")
        error.exit_code = min(finding.exit_code for finding in failed)
        raise error


@cli.command("prune")
@click.option(
    "--older-than", "before", type=_Age(), required=True, metavar="AGE",
    help="As 90d: a number and w, d, h or m.",
)  # fmt: skip
@_dsn_option
@_spool_option
@_archive_option
@click.option("--dry-run", is_flag=True, help="Count what is old, and remove nothing.")
@_json_option
def prune_command(
    before: datetime,
    dsn: str | None,
    spool_dir: Path | None,
    archive: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove old rows, ledger rows, and rejected and archived files.

    Rows go by their timestamp, in batches that do not hold up loading; it takes the owner of the tables, or
    a role that may delete.

    \b
    Examples:
      loader prune --older-than 90d --dry-run
      loader prune --older-than 90d
    """
    spool = settings.spool_directory(spool_dir)
    with until_signal() as signals, database.connect(settings.database_dsn(dsn)) as connection:
        rows = prune.Rows(connection, before)
        pruned = rows.count()
        if not dry_run:
            done = 0
            total = pruned.events + pruned.metrics + pruned.loads
            with _only_for("the owner of the tables, or who may DELETE"), screen.bar("rows", total) as shown:

                def deleted(count: int) -> None:
                    nonlocal done
                    done += count
                    shown(done)

                pruned = rows.delete(signals.stop, deleted)
    if not signals.stop.is_set():
        files = prune.files(spool, archive, before, dry_run=dry_run)
        pruned.rejected_files, pruned.archived_files = files.rejected_files, files.archived_files
    if as_json:
        screen.as_json({"before": before, "dry_run": dry_run, **asdict(pruned)})
    else:
        screen.say(f"{'older' if dry_run else 'removed'}: {screen.counts(asdict(pruned))}")
    if signals.stop.is_set():
        raise LoaderError(INTERRUPTED)


@cli.group("rejects")
def rejects_commands() -> None:
    """Look at the lines that were not loaded, and try them again.

    \b
    Examples:
      loader rejects list
      loader rejects show
      loader rejects retry
    """


def _complete_reject_file(ctx: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    try:
        files = rejects.files(settings.spool_directory(ctx.params.get("spool_dir")))
    except (LoaderError, OSError):
        return []
    return [CompletionItem(path.name) for path in files if path.name.startswith(begun)]


_names_argument = click.argument("names", nargs=-1, metavar="[FILE...]", shell_complete=_complete_reject_file)


@rejects_commands.command("list")
@_spool_option
@_json_option
def list_rejects(spool_dir: Path | None, as_json: bool) -> None:
    """List the reject files with their counts by reason.

    \b
    Examples:
      loader rejects list
      loader rejects list --json
    """
    rows = []
    for path in rejects.files(settings.spool_directory(spool_dir)):
        codes = rejects.count([path])
        if as_json:
            screen.as_json({"file": path.name, "lines": codes.total(), "codes": codes})
        rows.append((path.name, codes.total(), ", ".join(f"{code} {n}" for code, n in codes.most_common())))
    if rows and not as_json:
        screen.table(("file", "lines", "codes"), rows)
    elif not as_json:
        screen.say("No rejects.")


@rejects_commands.command("show")
@_names_argument
@_spool_option
@_json_option
def show_rejects(names: tuple[str, ...], spool_dir: Path | None, as_json: bool) -> None:
    """Show each rejected line with its place and reason.

    \b
    Examples:
      loader rejects show
      loader rejects show --json
    """
    for path in _reject_files(settings.spool_directory(spool_dir), names):
        for rejected in rejects.read(path):
            if as_json:
                screen.as_json(orjson.loads(rejected.encode()))
                continue
            screen.say(f"{rejected.file}, line {rejected.line}: {rejected.code}", "bold")
            screen.say(f"  {rejected.reason}")
            screen.say(f"  {rejected.raw[:2000].decode(errors='backslashreplace')}", "dim")


@rejects_commands.command("retry")
@_names_argument
@_dsn_option
@_spool_option
@_json_option
def retry_rejects(names: tuple[str, ...], dsn: str | None, spool_dir: Path | None, as_json: bool) -> None:
    """Load the rejected lines that have become loadable; the others stay.

    \b
    Examples:
      loader rejects retry
    """
    files = _reject_files(settings.spool_directory(spool_dir), names)
    report = Report()
    with (
        until_signal() as signals,
        database.connect(settings.database_dsn(dsn)) as connection,
        screen.bar("files", len(files)) as shown,
    ):
        for path in files:
            if signals.stop.is_set():
                break
            report.tally += retry_file(connection, path)
            report.files += 1
            shown(report.files)
    _finish(report, signals, as_json)


@cli.command()
@click.option("--dsn", metavar="DSN", help="A database to use; else an embedded one that is thrown away.")
def demo(dsn: str | None) -> None:
    """Show it all: a throw-away Postgres, an application's traffic, a SIGKILL, the loader, what arrived.

    \b
    Examples:
      loader demo
    """
    for needed in ("fastapi", "httpx", "uvicorn"):
        if find_spec(needed) is None:
            raise LoaderError(f"{needed} is not installed: pip install 'analytics-spool[embedded]'")
    from loader import demo as tour

    if not tour.run(settings.database_dsn(dsn) if dsn else None, screen.out):
        raise LoaderError("the demo's sums do not hold: see above")


@contextlib.contextmanager
def _only_for(who: str) -> Iterator[None]:
    """What the loader's own role may not do."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege as error:
        raise LoaderError(f"{error.diag.message_primary}: run this as {who}") from error


def _dsn_of(given: str | None) -> Callable[[], str]:
    """What gives the DSN now, and later, when it may have changed. Raises UsageError where there is none."""
    settings.database_dsn(given)
    return partial(settings.database_dsn, given)


def _patient(
    dsn: Callable[[], str], spool: Path, count: int, signals: Signals, health: Health | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Workers:  # fmt: skip
    """Workers for a command that ends by itself: a database that is not there at all is told at once."""
    database.connect(dsn()).close()
    return Workers(dsn, spool, count, signals, PATIENCE, health, tick)


def _reject_files(spool: Path, names: tuple[str, ...]) -> list[Path]:
    files = rejects.files(spool)
    known = {path.name for path in files}
    for name in names:
        if Path(name).name not in known:
            raise UsageError(f"{spool / rejects.DIRECTORY} has no {name}: see `loader rejects list`")
    wanted = {Path(name).name for name in names}
    return [path for path in files if not names or path.name in wanted]


def _finish(report: Report, signals: Signals | None, as_json: bool, **more: object) -> None:
    """Print what was done and end with the exit code that says it."""
    tally = report.tally
    counts = {
        "files": report.files, "lines": tally.lines + tally.known, "events": tally.events,
        "metrics": tally.metrics, "duplicates": tally.duplicates, "rejected": tally.rejected,
        "known": tally.known,
    }  # fmt: skip
    if as_json:
        screen.as_json({**counts, **more, "failures": report.failures})
    else:
        screen.say(screen.counts(counts))
        for name, why in report.failures.items():
            screen.warn(f"{name} {why}")
    if signals is not None and signals.stop.is_set():
        raise LoaderError(INTERRUPTED)
    if report.failures:
        raise LoaderError(f"{len(report.failures)} files were not loaded whole")
    if tally.rejected:
        sys.exit(SOME_REJECTED)
