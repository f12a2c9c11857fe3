"""The exception for input that cannot become a line."""

from __future__ import annotations


class Refused(ValueError):
    """The input cannot become a line. `cause` is the cause under which the drop is counted."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause
