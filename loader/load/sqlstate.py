"""What an error of Postgres means for a load: one table.

    REJECT  the row is at fault: it goes to the reject file with Postgres' own words
    RETRY   the server will recover: wait and try again, never reject
    STOP    a person must do something: keep the files, say what, try again slowly

Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html. Whole codes go before their class.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import psycopg

from loader.errors import LoaderError, OutOfReachError


class Action(Enum):
    REJECT = "reject"
    RETRY = "retry"
    STOP = "stop"


_ACTIONS: Final = {
    "22": Action.REJECT,  # data exception
    "23": Action.REJECT,  # integrity constraint violation
    "54": Action.REJECT,  # program limit exceeded: nested too deeply, row too large for an index
    "P0": Action.REJECT,  # a trigger that raises
    "08": Action.RETRY,  # connection exception
    "40": Action.RETRY,  # deadlock, serialization failure
    "53": Action.RETRY,  # disk full, out of memory, too many connections
    "55": Action.RETRY,  # lock not available, object in use
    "57": Action.RETRY,  # shutdown, crash, query cancelled
    "58": Action.RETRY,  # input or output error of the system
}


def action(sqlstate: str | None) -> Action:
    """Return what to do about an error. Without a code the connection itself broke: try again."""
    if sqlstate is None:
        return Action.RETRY
    return _ACTIONS.get(sqlstate) or _ACTIONS.get(sqlstate[:2], Action.STOP)


_ADVICE: Final = {
    "42P01": "run `loader init` first",
    "42703": "the tables are of another version: run `loader init`",
    "42501": "run `loader init --role` with the loader's role, as the owner of the tables",
    "25006": "the server is read-only: connect to the primary",
}


def advice(sqlstate: str | None) -> str:
    """Return what a person should do about an error, or an empty string."""
    return _ADVICE.get(sqlstate or "", "")


def explain(error: psycopg.Error | OSError | LoaderError) -> LoaderError:
    """Return what ends a command, or what a loader waits for, because of this error."""
    if isinstance(error, LoaderError):
        return error
    if isinstance(error, OSError):
        return LoaderError(f"can't write rejects: {error}")
    message = error.diag.message_primary or "; ".join(filter(None, map(str.strip, str(error).splitlines())))
    message = message.removeprefix("connection failed: ").removeprefix("connection is bad: ")
    if error.sqlstate is None or error.sqlstate[:2] in ("08", "57"):
        return OutOfReachError(f"the database is out of reach: {message}")
    if action(error.sqlstate) is Action.RETRY:
        return OutOfReachError(f"the database can't load now: {message}")
    return LoaderError(": ".join(filter(None, (message, advice(error.sqlstate)))))
