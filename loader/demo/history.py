"""Loads two months of synthetic history like any backfill, and renders the page over the last month."""

from __future__ import annotations

import contextlib
import http.server
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console

from loader.demo import month
from loader.errors import LoaderError
from loader.see import page, questions, report
from loader.see.period import period

ZONE: Final = "America/New_York"
SINCE: Final = "28d"


def load(environment: Mapping[str, str], console: Console) -> None:
    """Write the history to a file and load it with `loader backfill`. Raises LoaderError."""
    console.print(f"Loading {month.DAYS} days of synthetic history ...")
    with tempfile.TemporaryDirectory(prefix="analytics-history-") as name:
        file = Path(name) / "history.ndjson"
        with file.open("wb") as lines:
            lines.writelines(month.lines(datetime.now(UTC)))
        console.print(f"  {_loader(environment, 'backfill', str(file))}")
    _loader(environment, "rollup")


def _loader(environment: Mapping[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "loader", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise LoaderError(f"loader {arguments[0]} of the history failed: {ended.stderr.strip()}")
    return ended.stdout.strip()


def rendered(dsn: str) -> str:
    """Return the current page. Raises psycopg.Error, LoaderError."""
    with questions.reading(dsn) as connection:
        return page.render(report.gather(connection, period(SINCE, "now", ZONE)))


def write(dsn: str, file: Path | None) -> Path:
    """Write the page to the given file, or to one that is kept in the temporary directory. Returns the path."""
    if file is None:
        handle, name = tempfile.mkstemp(prefix="analytics-demo-", suffix=".html")
        os.close(handle)
        file = Path(name)
    file.write_text(rendered(dsn), encoding="utf-8")
    return file


@contextlib.contextmanager
def served(dsn: str) -> Iterator[str]:
    """Serve the page, rendered for each request, on a free local port; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.send_error(404)
                return
            body = rendered(dsn).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing: the terminal shows how to connect."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
