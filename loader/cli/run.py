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
@click.option("--once", is_flag=True, help="Load sealed segments and those of dead writers, then exit.")
@click.option(
    "--adopt", metavar="HOST", multiple=True,
    help="With --once, on a network file system: seal the open segments of HOST, whose writers must "
    "have exited.",
)  # fmt: skip
@click.option(
    "--metrics-port", type=click.IntRange(1, 65535), envvar="LOADER_METRICS_PORT",
    help="Serve Prometheus metrics and /healthz on this port; default: LOADER_METRICS_PORT.",
)  # fmt: skip
@click.option(
    "--metrics-address", metavar="ADDRESS", envvar="LOADER_METRICS_ADDRESS",
    help="Address for --metrics-port, 0.0.0.0 or :: for all; default: LOADER_METRICS_ADDRESS, or "
    "127.0.0.1 (this machine only).",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info", envvar="LOADER_LOG_LEVEL", show_default=True,
    help="Log level: info logs a summary each minute, debug each pass; default: LOADER_LOG_LEVEL.",
)  # fmt: skip
@options.as_json
def command(
    dsn: str | None, spool_dir: Path | None, workers: int, archive: Path | None, once: bool,
    adopt: tuple[str, ...], metrics_port: int | None, metrics_address: str | None, log_level: str, as_json: bool,
) -> None:  # fmt: skip
    """Watch a spool and load sealed segments, until SIGTERM.

    Under systemd, SIGHUP makes it reread the DSN and reconnect; otherwise SIGHUP stops it. Log lines are JSON
    unless standard error is a terminal.

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
        raise UsageError("--adopt requires --once")
    if as_json and not once:
        raise UsageError("--json requires --once: the daemon's log is already JSON")
    if metrics_address and metrics_port is None and not once:
        raise UsageError("--metrics-address requires --metrics-port (LOADER_METRICS_PORT)")
    source = dsn_source(dsn)
    spool = settings.spool_directory(spool_dir)
    if dsn and settings.has_password(dsn):
        terminal.warn("--dsn exposes its password in the process list: use LOADER_DSN or LOADER_DSN_FILE")
    with until_signal() as signals:
        if once:
            _run_once(source, spool, workers, archive, adopt, signals, as_json)
            return
        faulthandler.enable()  # so that the journal shows all stacks if systemd's watchdog aborts
        watching = daemon.Daemon(source, spool, workers, signals, archive, Notifier())
        if metrics_port is not None:
            from loader.service import metrics  # which is slow to import

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
        terminal.say(f"sealed {len(sealed)} segments; the loader running here loads them")
        return
    with exclusive(spool), terminal.bar("loading", backlog(spool).sealed_bytes, of_bytes=True) as shown:
        health = Health()
        pool = patient_workers(dsn, spool, workers, signals, health, lambda: shown(health.total.bytes))
        with contextlib.closing(pool):
            accounts.settle_quietly(dsn, spool)  # the drops it reports are loaded, too
            found, report = daemon.once(spool, pool, archive, adopt)
            accounts.settle_quietly(dsn, spool)
        upkeep.make_partitions_quietly(dsn)
    for name, reason in found.skipped.items():
        terminal.warn(f"skipped {name}: {reason}")
    finish(report, signals, as_json=as_json)
