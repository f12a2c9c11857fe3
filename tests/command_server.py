"""Runs `loader` commands as separate processes without importing their libraries for each.

A server process imports the libraries; it forks for each command, which then imports `loader` itself and runs
it as `python -m loader` does, one command at a time. A command takes 0.23 s of CPU instead of 0.66 s (`python
-m tests.command_server`). Processes whose start matters (daemons, terminals, strace) are started by their own
command line instead.
"""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Final

_LIBRARIES: Final = (
    "click", "msgspec.json", "prometheus_client", "psycopg", "pythonjsonlogger.json", "rich.console",
    "rich.progress", "rich.table", "tenacity", "watchfiles", "zstandard",
)  # fmt: skip
_MOST_BYTES: Final = 1 << 17
"""Of a request: arguments and environment."""


def run(
    arguments: Sequence[str], environment: Mapping[str, str], stdin: bytes
) -> subprocess.CompletedProcess[bytes]:
    """Run `loader`; like subprocess.run with captured output."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as printed,
        tempfile.TemporaryFile() as errors,
    ):
        given.write(stdin)
        given.seek(0)
        request = pickle.dumps((list(arguments), dict(environment), str(Path.cwd())))
        server = _server()
        socket.send_fds(server, [request], [given.fileno(), printed.fileno(), errors.fileno()])
        code = int(server.recv(_MOST_BYTES))
        printed.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(["loader", *arguments], code, printed.read(), errors.read())


@cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", "from tests.command_server import serve; serve()"]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno())
    atexit.register(process.wait)
    atexit.register(ours.close)  # called first; the server exits when its socket is closed
    return ours


def serve() -> None:
    """Run the commands received on the socket (standard input) until its other end is closed."""
    for library in _LIBRARIES:
        import_module(library)
    with socket.socket(fileno=os.dup(0)) as requests:
        while True:
            request, streams, _, _ = socket.recv_fds(requests, _MOST_BYTES, 3)
            if not request:
                return
            if (command := os.fork()) == 0:
                break
            for stream in streams:
                os.close(stream)
            requests.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
    _become_the_command(request, streams)


def _become_the_command(request: bytes, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    arguments, environment, directory = pickle.loads(request)  # noqa: S301 (our own parent's)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[1:] = arguments
    runpy.run_module("loader", run_name="__main__", alter_sys=True)


def _measure(tries: int = 20) -> None:
    """Print the run time of a command, forked and started."""
    arguments = ["status", "--spool-dir", "/tmp", "--dsn", "host=/nowhere"]
    alone = [sys.executable, "-m", "loader", *arguments]
    run(arguments, os.environ, b"")  # starts the server
    begun = time.perf_counter()
    for _ in range(tries):
        run(arguments, os.environ, b"")
    forked = time.perf_counter()
    for _ in range(tries):
        subprocess.run(alone, capture_output=True)
    started = time.perf_counter()
    print(f"forked {(forked - begun) / tries:.2f} s, started {(started - forked) / tries:.2f} s")


if __name__ == "__main__":
    _measure()
