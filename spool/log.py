"""The package's logger, "spool"; it also works if the application's logging configuration does not mention it.

`logging.config.dictConfig`, which Django uses for LOGGING, disables every existing logger unless
`disable_existing_loggers` is false. The warnings of this package would disappear without anybody having
chosen that. So a disabled logger is replaced by an unregistered one of the same name: its records are sent to
the root logger's handlers or, if there are none, to standard error (logging's last resort). To silence the
package, set the level of the logger "spool" and keep it enabled.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Final

LOG_INTERVAL: Final = 60.0
"""Minimum number of seconds between two warnings of one kind."""
_NAMED = logging.getLogger("spool")
_UNKNOWN = logging.Logger("spool")  # noqa: LOG001  # getLogger would register it
_UNKNOWN.parent = logging.root


def logger() -> logging.Logger:
    """Return the logger to use now."""
    return _UNKNOWN if _NAMED.disabled else _NAMED


class Warnings:
    """Logs at most one message per LOG_INTERVAL."""

    def __init__(self) -> None:
        self._logged_at = -LOG_INTERVAL

    def log(self, message: str, *values: object) -> None:
        if self.is_due():
            self._logged_at = time.monotonic()
            with contextlib.suppress(
                Exception
            ):  # a handler must not be interrupted by itself while it writes
                logger().warning(message, *values)

    def is_due(self) -> bool:
        return self.seconds() <= 0

    def seconds(self) -> float:
        """Return the seconds after which the next message may be logged."""
        return self._logged_at + LOG_INTERVAL - time.monotonic()
