"""What an error of Postgres means for a load: one table.

    REJECT  the row is at fault: it goes to the reject file with Postgres' own words
    RETRY   the server will recover: wait and try again, never reject
    STOP    a person must do something: keep the files, say what, try again slowly

Two rules are stronger than the code. If the other rows of a batch load and one does not, that row is at fault
(insert.py). And what a function raises by itself says nothing about the server, whatever its code.
Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html. Whole codes go before their class.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

import psycopg

from loader.errors import LoaderError, LoginRefusedError, OutOfReachError


class Action(Enum):
    REJECT = "reject"
    RETRY = "retry"
    STOP = "stop"


_ACTIONS: Final = {
    "25P03": Action.RETRY,  # ended by a timeout for idle transactions
    "25P04": Action.RETRY,  # ended by a timeout for transactions
    "55006": Action.RETRY,  # object in use
    "55P03": Action.RETRY,  # lock not available
    "22": Action.REJECT,  # data exception
    "23": Action.REJECT,  # integrity constraint violation
    "54": Action.REJECT,  # program limit exceeded: nested too deeply, row too large for an index
    "44": Action.REJECT,  # check option of a view
    "P0": Action.REJECT,  # a trigger that raises
    "08": Action.RETRY,  # connection exception
    "40": Action.RETRY,  # deadlock, serialization failure
    "53": Action.RETRY,  # disk full, out of memory, too many connections
    "57": Action.RETRY,  # shutdown, crash, query cancelled
    "58": Action.RETRY,  # input or output error of the system
}


def action(sqlstate: str | None) -> Action:
    """Return what to do about an error. Without a code the connection itself broke: try again."""
    if sqlstate is None:
        return Action.RETRY
    return _ACTIONS.get(sqlstate) or _ACTIONS.get(sqlstate[:2], Action.STOP)


_CHECK_VIOLATION: Final = "23514"
_RAISE: Final = "exec_stmt_raise"
"""Function of Postgres' source that reports what PL/pgSQL's RAISE raised."""


def is_raised(error: psycopg.Error) -> bool:
    """Whether a function, such as a trigger, raised this on purpose."""
    return error.diag.source_function == _RAISE


def is_temporary(error: psycopg.Error) -> bool:
    """Whether the server or the connection is at fault for now, and no row is."""
    return action(error.sqlstate) is Action.RETRY and not is_raised(error)


_INTERNAL: Final = ("XX000", "25P02")
"""Codes with which Citus reports that a worker failed, or every error that a worker has in a COPY, and that a
savepoint was not rolled back on a worker, which happens after such a COPY."""


def is_internal(error: psycopg.Error) -> bool:
    """Whether the code is one that, on Citus, does not mean what it means on a single server."""
    return error.sqlstate in _INTERNAL


def concerns_no_row(error: psycopg.Error, *, distributed: bool) -> bool:
    """Whether no row of a batch is at fault: server, connection or a missing partition is, or a node of Citus.

    Citus passes on no name of a constraint, so `lacks_partition` would hold for every check. There, rows without
    a partition of their own are in the default one.
    """
    if distributed:
        return is_temporary(error) or is_internal(error)
    return is_temporary(error) or lacks_partition(error)


def is_lost(error: psycopg.Error) -> bool:
    """Whether the connection broke, or the server ended it, as after a time without work."""
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P", "25P03", "25P04"))


MIGRATION_CHECKS: Final = ("analytics_events_until", "analytics_metrics_until")
"""Constraints of a table that is being migrated; see migrate.py."""


def lacks_partition(error: psycopg.Error) -> bool:
    """Whether a row waits for its partition to be made, or for a migration to end; it is not at fault.

    Postgres reports both as 23514, the former without the name of a constraint (ExecFindPartition and
    ExecPartitionCheckEmitError in its source).
    """
    if error.sqlstate != _CHECK_VIOLATION or is_raised(error):
        return False
    return (error.diag.constraint_name or "") in ("", *MIGRATION_CHECKS)


def retry_pattern(*, distributed: bool) -> str:
    """Return a regular expression of Postgres for the codes that mean an outage; see `concerns_no_row`."""
    codes = [code for code, what in _ACTIONS.items() if what is Action.RETRY]
    return "^(" + "|".join([*codes, *_INTERNAL] if distributed else codes) + ")"


_ADVICE: Final = {
    "42P01": "run `loader init` first",
    "42703": "the tables are of another version: run `loader init`",
    "42501": "run `loader init --role` with the loader's role, as the owner of the tables",
    "25006": "the server is read-only: connect to the primary",
}


_LOGIN_ADVICE: Final = {
    "password authentication failed": "check the user and the password of the DSN",
    "no password supplied": "put the password into the DSN, or into the file LOADER_DSN_FILE",
    "authentication failed": "let this user in with a line in pg_hba.conf, or change the DSN",
    "no pg_hba.conf entry": "let this user in with a line in pg_hba.conf, or change the DSN",
    'role ".*" does not exist': "make the role with `loader init --role`, or change the user of the DSN",
    'role ".*" is not permitted to log in': "ALTER ROLE ... LOGIN, as a superuser",
    'database ".*" does not exist': "change the database of the DSN, or create it",
    "permission denied for database": "GRANT CONNECT ON DATABASE ... TO the role, as the database's owner",
}
"""Pattern of a refusal (SQLSTATE 28P01, 28000, 3D000, 42501) and what to do. libpq passes on no code of a failed
login, only the text (https://www.postgresql.org/docs/current/libpq-connect.html)."""


_OUT_OF_REACH: Final = ("08", "57P01", "57P02", "57P03")
"""The connection broke, or the server shuts down, crashed or starts."""


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
    if error.sqlstate is None and (login := _login_advice(message)):
        return LoginRefusedError(f"the database refused the login: {message}: {login}")
    if error.sqlstate is None or error.sqlstate.startswith(_OUT_OF_REACH):
        return OutOfReachError(f"the database is out of reach: {message}")
    if action(error.sqlstate) is Action.RETRY:
        return OutOfReachError(f"the database can't load now: {message}")
    help_text = _partition_advice(error) if lacks_partition(error) else advice(error.sqlstate)
    return LoaderError(": ".join(filter(None, (message, help_text))))


def _partition_advice(error: psycopg.Error) -> str:
    if error.diag.constraint_name:
        return "`loader migrate` has not finished: run it again"
    return "create the partition, or a default partition"


def _login_advice(message: str) -> str:
    """Return what to do if the message is a server's refusal of a login, else an empty string."""
    return next((what for pattern, what in _LOGIN_ADVICE.items() if re.search(pattern, message)), "")
