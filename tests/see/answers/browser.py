"""Headless Chromium, driven through a pipe by its own protocol.

https://chromedevtools.github.io/devtools-protocol
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

PROGRAM: Final = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
# Chromium's own requests (updates, accounts) would be mistaken for requests of the page.
_FLAGS: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--disable-component-update", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """A tab with its requests and console messages."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._waiting, self._last = write, read, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call and return the result; record events received in between."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (received := self._receive()).get("id") != self._last:
            self._note(received)
        if "error" in received:
            raise AssertionError(f"{method}: {received['error']}")
        return received["result"]

    def open(self, address: str, width: int = 1100, *, dark: bool = False) -> None:
        """Open a page and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests, self.messages = [], []
        self.call("Page.navigate", url=address)
        while (received := self._receive()).get("method") != "Page.loadEventFired":
            self._note(received)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression or promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Write the whole page as PNG."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(image["data"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            block = os.read(self._read, 1 << 20)
            assert block, "Chromium ended"
            self._waiting += block
        message, _, self._waiting = self._waiting.partition(b"\0")
        received: dict[str, Any] = json.loads(message)
        return received

    def _note(self, received: dict[str, Any]) -> None:
        method, values = received.get("method"), received.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(values["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.messages.append(f"dialog: {values['message']}")


@contextmanager
def browser() -> Iterator[Page]:
    """Run Chromium with a new profile. It reads commands from descriptor 3 and replies on 4."""
    assert PROGRAM is not None
    commands, write = os.pipe()
    read, answers = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$@" 3<&{commands} 4>&{answers}'
        arguments = [PROGRAM, *_FLAGS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            ["bash", "-c", script, "-", *arguments], pass_fds=(commands, answers), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(answers)
        try:
            yield Page(write, read)
        finally:
            process.kill()
            process.wait()
            os.close(write)
            os.close(read)
