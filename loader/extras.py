"""The package's extras: modules that a command needs beyond the loader, and how to install them here.

The package is not on an index. `direct_url.json` (PEP 610), which pip and uv write for a directory, an
archive or a repository, records how it was installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from loader.errors import LoaderError

_PACKAGE: Final = "analytics-spool"


def require(modules: Iterable[str], extra: str) -> None:
    """Raise LoaderError for the first module that is not installed, with the command that installs it."""
    for module in modules:
        if find_spec(module) is None:
            raise LoaderError(missing(module, extra))


def missing(module: str, extra: str) -> str:
    """Return a message for a module that is not installed, with the extra that provides it."""
    return f"{module} is not installed: {install_command(extra)}"


def install_command(extra: str) -> str:
    """Return the command that installs an extra from the package's own source."""
    return f"pip install {_source(_direct_url(), extra)}"


def _direct_url() -> dict[str, Any]:
    try:
        text = distribution(_PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:  # on sys.path, but not installed
        return {}
    return json.loads(text) if text else {}


def _source(found: dict[str, Any], extra: str) -> str:
    url = found.get("url", "")
    if "dir_info" in found:
        editable = "-e " if found["dir_info"].get("editable") else ""
        return f"{editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in found:
        vcs = found["vcs_info"]
        revision = vcs.get("requested_revision") or vcs["commit_id"]
        return f"'{_PACKAGE}[{extra}] @ {vcs['vcs']}+{url}@{revision}'"
    return f"'{_PACKAGE}[{extra}] @ {url}'" if url else f"'{_PACKAGE}[{extra}]'"
