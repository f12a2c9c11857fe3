"""`loader demo --keep`: its output is enough to connect, and Ctrl-C stops everything."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.processes import LOADER, environment

pytest.importorskip("vl_convert", reason="the extra report is not installed")


@pytest.mark.long  # the demo itself is run by tests/commands/test_cli.py
def test_the_demo_ends_with_the_page_and_keeps_everything_running_until_a_signal(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = [*LOADER, "demo", "--keep", "--html", str(page)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("Page, rendered"):
                break
        try:
            assert "page without script" in printed, printed
            assert page.read_text("utf-8").startswith("<!doctype html>")
            (address,) = re.findall(r"^Page, rendered for each request: (\S+)", printed, re.MULTILINE)
            with urllib.request.urlopen(address) as answer:
                live = answer.read().decode()
            assert "memory_viewed" in live and "Unusual hours" in live
            (exports,) = re.findall(r"^  (export LOADER_DSN=.*)$", printed, re.MULTILINE)
            ask = f"{exports}; {' '.join(LOADER)} ask active --since 7d --csv"
            rows = subprocess.run(["bash", "-c", ask], env=environment(), capture_output=True, text=True)
            assert rows.returncode == 0 and len(rows.stdout.splitlines()) == 9, rows.stderr
        finally:
            os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C
            process.communicate(timeout=60)
        assert process.returncode == 0
