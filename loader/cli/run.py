"""`loader run`."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loader import settings
from loader.cli import options, terminal
from loader.errors import UsageError

if TYPE_CHECKING:
    from loader.service.signals import Signals


@click.command("run")
@options.dsn
@options.spool_dir
@options.workers
@options.archive
@click.option("--once", is_flag=True, help="Load what is sealed, segments of dead writers too, and exit.")
@click.option(
    "--adopt", metavar="HOST", multiple=True,
    help="With --once, on a network file system: seal open segments of HOST, whose writers have ended.",
)  # fmt: skip
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), envvar="LOADER_METRICS_PORT",
    help="Answer Prometheus, and probes of /healthz, on this port; else LOADER_METRICS_PORT.",
)  # fmt: skip
@click.option(
    "--metrics-address", metavar="ADDRESS", envvar="LOADER_METRICS_ADDRESS",
    help="With --metrics-port, listen on this address, 0.0.0.0 or :: for all; else LOADER_METRICS_ADDRESS, "
    "else 127.0.0.1: this machine only.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info", envvar="LOADER_LOG_LEVEL", show_default=True,
    help="What is logged: info has a summary each minute, debug each pass; else LOADER_LOG_LEVEL.",
)  # fmt: skip
@options.as_json
def command(
    dsn: str | None, spool_dir: Path | None, workers: int, archive: Path | None, once: bool,
    adopt: tuple[str, ...], metrics_port: int | None, metrics_address: str | None, log_level: str, as_json: bool,
) -> None:  # fmt: skip
    """Watch a spool and load what is sealed, until SIGTERM.

    Under systemd, SIGHUP makes it reconnect, with the DSN as it is then; elsewhere it ends it. Log lines are
    JSON unless they go to a terminal.

    \b
    Examples:
      loader run --metrics-port 9187 --archive /var/lib/analytics-archive
      loader run --once
    """
    from loader.cli.loading import dsn_source
    from loader.service import daemon, log_format
    from loader.service.notify import Notifier
    from loader.service.signals import until_signal

    log_format.to_stderr(logging.getLevelNamesMapping()[log_level.upper()])
    if adopt and not once:
        raise UsageError("--adopt goes with --once")
    if as_json and not once:
        raise UsageError("--json goes with --once: the daemon's log is JSON already")
    if metrics_address and metrics_port is None and not once:
        raise UsageError("--metrics-address goes with --metrics-port (LOADER_METRICS_PORT)")
    source = dsn_source(dsn)
    spool = settings.spool_directory(spool_dir)
    if dsn and settings.has_password(dsn):
        terminal.warn(
            "--dsn shows its password to everyone who lists processes: use LOADER_DSN or LOADER_DSN_FILE"
        )
    with until_signal() as signals:
        if once:
            _run_once(source, spool, workers, archive, adopt, signals, as_json)
            return
        faulthandler.enable()  # when systemd's watchdog aborts it, the journal shows what each thread did
        watching = daemon.Daemon(source, spool, workers, signals, archive, Notifier())
        if metrics_port is not None:
            from loader.service import metrics  # which takes long to import

            metrics.serve(metrics_address or metrics.ADDRESS, metrics_port, spool, watching.health)
        watching.run()


def _run_once(
    dsn: Callable[[], str], spool: Path, workers: int, archive: Path | None, adopt: tuple[str, ...],
    signals: Signals, as_json: bool,
) -> None:  # fmt: skip
    from loader.cli.loading import finish, patient_workers
    from loader.files.lock import exclusive, holder
    from loader.files.scan import backlog, scan
    from loader.service import accounts, daemon, upkeep
    from loader.service.health import Health

    if adopt and holder(spool):
        sealed = scan(spool, adopt=adopt).adopted
        terminal.say(f"sealed {len(sealed)} segments, which the loader that runs here loads")
        return
    with exclusive(spool), terminal.bar("loading", backlog(spool).sealed_bytes, of_bytes=True) as shown:
        health = Health()
        pool = patient_workers(dsn, spool, workers, signals, health, lambda: shown(health.total.bytes))
        with contextlib.closing(pool):
            accounts.settle_quietly(dsn, spool)  # what it reports is loaded, too
            found, report = daemon.once(spool, pool, archive, adopt)
            accounts.settle_quietly(dsn, spool)
        upkeep.make_partitions_quietly(dsn)
    for name, reason in found.skipped.items():
        terminal.warn(f"skipped {name}: {reason}")
    finish(report, signals, as_json=as_json)
