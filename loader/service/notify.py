"""Notifications to systemd over the socket in NOTIFY_SOCKET (sd_notify(3)). Without it, nothing is sent.

READY=1                 after the first scan of the spool, once the database has answered or STATUS reports
                        that the loader waits for it
STATUS=                 backlog, rate, what the loader waits for
WATCHDOG=1              only after progress: a commit, a failed attempt that will be repeated, a scan of the
                        spool; a hanging loader sends nothing and is restarted
RELOADING=1, STOPPING=1
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Final

from loader.errors import one_line

_LONGEST_STATUS: Final = 400


class Notifier:
    """Sends notifications to systemd. Any thread may use it; it never raises and never waits."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._lock = threading.Lock()
        self._ready = False
        self._status = ""
        self._alive_at = 0.0
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_seconds = int(environment.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0
        """The watchdog interval of systemd, or 0 if there is no watchdog."""

    def ready(self) -> None:
        """Report readiness: once after the start, and after each reload."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def reloading(self) -> None:
        self._ready = False
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Send the one-line status if it has changed."""
        text = one_line(text)[:_LONGEST_STATUS]
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Report progress, at most a few times per watchdog interval however often it is called."""
        now = time.monotonic()
        with self._lock:
            if not self.watchdog_seconds or now - self._alive_at < self.watchdog_seconds / 8:
                return
            self._alive_at = now
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                line.setblocking(False)
                line.sendto(message.encode(), self._address)
        except OSError:
            pass  # systemd has exited or will restart a silent service
