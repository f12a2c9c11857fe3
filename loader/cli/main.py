"""The command line: imports each command when it is called, and turns errors into one line and an exit code.

A command's module imports what it needs, so that `--version`, `--help` and completion load no driver.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from importlib import import_module
from typing import Any, Final, NoReturn

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from loader.errors import LoaderError, one_line
from loader.service import journal

COMMANDS: Final = {
    "init": "Create or upgrade the tables; idempotent.",
    "run": "Watch a spool and load sealed segments, until SIGTERM.",
    "backfill": "Load files, directories, or - for standard input.",
    "status": "Show the backlog, the loaded rows and the rejects.",
    "tail": "Print the last lines of the spool, including open segments.",
    "doctor": "Check everything that the loader needs, and print remedies.",
    "rejects": "List, show, retry, export and drop rejected lines.",
    "ask": "Answer a question about the loaded data.",
    "report": "Summarize the loaded data, in the terminal or as a page.",
    "export": "Write events or metrics to Parquet, CSV or NDJSON, or all data about a person.",
    "migrate": "Convert plain tables to partitioned ones, while loaders and readers continue.",
    "rollup": "Refresh the rollups of hours with new rows.",
    "erase": "Permanently erase all data about a person or a family.",
    "prune": "Delete old rows, ledger rows, and rejected and archived files.",
    "schema": "Print the format of a line, for writers in other languages.",
    "demo": "Run the whole pipeline against a temporary Postgres.",
}
"""The commands and their short help; each is `command` in the module of its name."""


class Commands(click.Group):
    """The group of commands, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"loader.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        commands = [
            CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal's encoding may lack characters of a line
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
            sys.exit(code)
        except BrokenPipeError:  # `loader ask ... | head`: the reader has closed the pipe
            _discard_output()
            sys.exit(LoaderError.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted: run the command again to continue", LoaderError.exit_code)
        except click.UsageError as error:
            _name_the_variable(error)
            command = error.ctx.command_path if error.ctx else "loader"
            _fail(f"{error.format_message()} See `{command} --help`.", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (LoaderError, OSError) as error:
            _fail(str(error), getattr(error, "exit_code", LoaderError.exit_code))
        except Exception as error:
            _fail_for_database(error)
            traceback.print_exc()
            _fail(f"this is a bug in the loader {_version()}: please report it with the lines above", 1)


def _discard_output() -> None:
    """Discard the remaining output, so that Python does not report a broken pipe at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            os.dup2(devnull, stream.fileno())


def _name_the_variable(error: click.UsageError) -> None:
    """Name the variable instead of the option if an invalid value comes from the environment."""
    if not (isinstance(error, click.BadParameter) and error.ctx and error.param and error.param.name):
        return
    if error.ctx.get_parameter_source(error.param.name) is ParameterSource.ENVIRONMENT:
        error.param_hint = f"{error.param.envvar}"


def _fail_for_database(error: Exception) -> None:
    """Exit if this is a database error; the driver is imported only to check this."""
    psycopg = sys.modules.get("psycopg")
    if psycopg is not None and isinstance(error, psycopg.Error) and not _is_misuse(error, psycopg):
        from loader.load.sqlstate import explain  # imports psycopg

        explained = explain(error)
        _fail(str(explained), explained.exit_code)


def _is_misuse(error: Any, psycopg: Any) -> bool:
    """Whether the driver itself raised the error because of an invalid call."""
    wrong = (psycopg.ProgrammingError, psycopg.InterfaceError, psycopg.NotSupportedError, psycopg.DataError)
    return error.sqlstate is None and isinstance(error, wrong)


def _version() -> str:
    from importlib.metadata import version

    return version("analytics-spool")


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"{journal.prefix(logging.ERROR)}Error: {one_line(message)}", err=True)
    sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
