"""Errors that end a command. Each has a one-line message for people and an exit code for scripts."""

from __future__ import annotations


class LoaderError(Exception):
    """The command failed."""

    exit_code = 1


class UsageError(LoaderError):
    """An invalid request: an argument or a setting must change."""

    exit_code = 2


class OutOfReachError(LoaderError):
    """The database did not answer."""

    exit_code = 4


class LoginRefusedError(OutOfReachError):
    """The database refused the login: the DSN or the server's configuration must change."""


class DamagedFileError(LoaderError, ValueError):
    """A file in the spool does not have the contents that the loader writes."""


SOME_REJECTED = 3
"""Exit code of a command that did its work but rejected some lines."""


def one_line(text: str) -> str:
    """Return external text as one line without control characters."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
