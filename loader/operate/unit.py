"""Finds the database of the service from its configuration files in /etc/analytics-loader.

analytics-loader.service         environment, dsn               for the spool /var/spool/analytics
analytics-loader@NAME.service    NAME.environment, NAME.dsn     for the spool /var/spool/analytics-NAME
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from loader import settings
from loader.errors import UsageError

DIRECTORY: Final = Path("/etc/analytics-loader")
_PREFIX: Final = "analytics-"


def database_dsn(spool: Path | None, directory: Path = DIRECTORY) -> tuple[str, str] | None:
    """Return the DSN of the service that loads this spool, and the file that contains it, or None.

    Raises UsageError, with the command to run, if a file or the DSN cannot be read.
    """
    name = spool.name.removeprefix(_PREFIX) if spool and spool.name.startswith(_PREFIX) else ""
    environment_file = directory / (f"{name}.environment" if name else "environment")
    dsn_file = directory / (f"{name}.dsn" if name else "dsn")
    environment = _variables(_read(environment_file))
    if environment.get("LOADER_DSN"):
        return settings.database_dsn(None, environment), str(environment_file)
    if written := _read(dsn_file).strip():
        return settings.database_dsn(written, {}), str(dsn_file)
    if settings.has_database(None, environment):
        return settings.database_dsn(None, environment), str(environment_file)
    return None


def _read(file: Path) -> str:
    """Return the text of a file, empty if it does not exist. Raises UsageError."""
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        me = settings.owner(os.geteuid())
        raise UsageError(
            f'no database is set, and the user {me} cannot read the settings of the service in "{file}" '
            f"({error.strerror}): run `sudo loader doctor`, or set LOADER_DSN"
        ) from None


def _variables(text: str) -> Mapping[str, str]:
    """Return the assignments in an environment file (systemd.exec(5), EnvironmentFile=)."""
    found: dict[str, str] = {}
    for line in text.replace("\\\n", "").splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            found[name.strip()] = _unquoted(value.strip())
    return found


def _unquoted(value: str) -> str:
    try:
        return "".join(shlex.split(value)) if value[:1] in ("'", '"') else value
    except ValueError:  # an unterminated quote
        return value
