"""What ends a command: each error is one sentence for a person and an exit code for a script."""

from __future__ import annotations


class LoaderError(Exception):
    """The command failed."""

    exit_code = 1


class UsageError(LoaderError):
    """What was asked for can't be: an argument or a setting must change."""

    exit_code = 2


class OutOfReachError(LoaderError):
    """The database did not answer."""

    exit_code = 4


class LoginRefusedError(OutOfReachError):
    """The database answered, and refused the login: a person must change the DSN or the server."""


class DamagedFileError(LoaderError, ValueError):
    """A file of the spool does not hold what the loader writes."""


SOME_REJECTED = 3
"""Exit code of a command that did its work but rejected some lines."""


def one_line(text: str) -> str:
    """Text from outside, in one line and without anything that a terminal would obey."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
