"""Checks of the emitting side: `python -m spool`, or `spool.check.findings()` inside a server.

    python -m spool           # as the application's user, with its environment

Checks the platform, the settings, the directory and its file system and uWSGI's options, and emits one test
event. The event is written to a temporary directory beside the segments and removed, so it is never loaded.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import orjson

from spool import fork, kernel
from spool.directory import problem_of
from spool.emitter import Emitter
from spool.settings import Settings

_TEST_EVENT = "spool_check"


class Finding(NamedTuple):
    """The result of a check; `verdict` is ok, warning or failed, as in `loader doctor`."""

    verdict: str
    check: str
    finding: str


def findings() -> Iterator[Finding]:
    """Yield the findings for this process, up to the first failure."""
    yield _platform()
    try:
        settings = Settings.of()
    except ValueError as error:
        yield Finding("failed", "settings", f"{error}")
        return
    yield _settings(settings)
    yield from _server()
    directory = _directory(settings.directory)
    yield directory
    if directory.verdict != "failed" and kernel.SUPPORTED:
        yield from _test_event(settings)


def _platform() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if not kernel.SUPPORTED:
        return Finding("failed", "platform", f"{sys.platform} cannot write segments: every line is dropped")
    if sys.platform != "linux":
        return Finding(
            "warning", "platform", f"{sys.platform}, Python {version}: supported for development only"
        )
    return Finding("ok", "platform", f"{sys.platform}, Python {version}")


def _settings(settings: Settings) -> Finding:
    given = [
        f"{field.name} {value}"
        for field in fields(settings)
        if field.name != "redact" and (value := getattr(settings, field.name)) != field.default
    ]
    if settings.disabled:
        return Finding("warning", "settings", "SPOOL_DISABLED is set: nothing is written")
    return Finding("ok", "settings", ", ".join(given) or "all defaults")


def _server() -> Iterator[Finding]:
    options, worker = fork._uwsgi()
    for problem in fork.uwsgi_problems(options, worker):
        yield Finding("warning", "uwsgi", problem)
    if not options:
        yield Finding("ok", "uwsgi", "this process does not run in uWSGI; there, call spool.check.findings()")


def _directory(directory: Path) -> Finding:
    if (problem := problem_of(directory)) is not None:
        return Finding(
            "failed",
            "directory",
            f'"{directory}": {problem}; set SPOOL_DIR to a directory that this process may write to',
        )
    status = f"{directory}" if directory.exists() else f"{directory}, created by the first emit"
    if directory.exists() and directory.stat().st_mode & stat.S_IWOTH:
        remedy = f"chmod 2770 {directory}, or set SPOOL_DIR to {directory}/analytics, made by mkdir -m 2770"
        finding = f"{directory}: world-writable, so a loader that does not own it refuses it; {remedy}"
        return Finding("warning", "directory", finding)
    user = f" as user {os.geteuid()}" if hasattr(os, "geteuid") else ""
    return Finding("ok", "directory", status + user)


def _test_event(settings: Settings) -> Iterator[Finding]:
    beside = settings.directory
    while not beside.exists():
        beside = beside.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".spool-check-", dir=beside) as temporary:
            yield _file_system(Path(temporary), settings)
            yield _emit_one(replace(settings, directory=Path(temporary), disabled=False, console=False))
    except OSError as error:
        yield Finding("failed", "directory", f"could not write to {beside}: {error}")


def _file_system(directory: Path, settings: Settings) -> Finding:
    with tempfile.TemporaryFile(dir=directory) as file:
        mapped = kernel.overwrites_in_place(file.fileno())
    if mapped and settings.mapped:
        return Finding("ok", "file system", "segments are mapped: an emit makes no system call")
    reason = "SPOOL_MAPPED is 0" if mapped else "it may not overwrite blocks in place"
    verdict = "ok" if mapped else "warning"
    finding = f"{reason}, so each line is one write(2): slower when other threads are busy"
    return Finding(verdict, "file system", finding)


def _emit_one(settings: Settings) -> Finding:
    nobody = uuid.UUID(int=0)
    options = {field.name: getattr(settings, field.name) for field in fields(settings)}
    with closing(Emitter(**options)) as emitter:
        event_id = emitter.emit_event(event_type=_TEST_EVENT, user_id=nobody, family_unit_id=nobody)
    lines = [line for file in settings.directory.glob("*.ndjson") for line in file.read_bytes().splitlines()]
    if event_id is None or event_id not in [orjson.loads(line)["event_id"] for line in lines]:
        dropped = ", ".join(emitter.stats().dropped) or "no segment contains it"
        return Finding("failed", "test event", f"it was dropped: {dropped}")
    return Finding("ok", "test event", f"emitted, sealed, read and removed: {len(lines[0])} bytes")


def main() -> int:
    """Print the findings. Returns 1 if a check failed, else 0."""
    failed = False
    for verdict, check, finding in findings():
        failed |= verdict == "failed"
        print(f"{verdict:<8} {check:<11} {finding}")
    return int(failed)
