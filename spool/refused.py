"""What cannot be written, and under which word it is counted."""

from __future__ import annotations


class Refused(ValueError):
    """What was given cannot become a line. `cause` is the word it is counted under."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause
