"""Maps Postgres errors to actions of a load.

    REJECT  the row is at fault: it is written to the reject file with Postgres' message
    RETRY   the server will recover: wait and try again, never reject
    STOP    a person must act: keep the files, report the remedy, retry slowly

Two rules override the code. If only one row of a batch cannot be loaded, that row is at fault
(isolate.py). And an error raised by a function reveals nothing about the server, whatever its code.
Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html. Full codes take precedence over their class.
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
    """Return the action for an error. Without a code the connection itself broke: retry."""
    if sqlstate is None:
        return Action.RETRY
    return _ACTIONS.get(sqlstate) or _ACTIONS.get(sqlstate[:2], Action.STOP)


_CHECK_VIOLATION: Final = "23514"
_PARTITION_CHECK: Final = "ExecPartitionCheckEmitError"
"""The function in Postgres' source that reports a row outside the bounds of its partition."""
_RAISE: Final = "exec_stmt_raise"
"""The function in Postgres' source that reports an error of PL/pgSQL's RAISE."""


def is_raised(error: psycopg.Error) -> bool:
    """Whether a function, such as a trigger, raised this error with RAISE."""
    return error.diag.source_function == _RAISE


def is_temporary(error: psycopg.Error) -> bool:
    """Whether the server or the connection is temporarily at fault, and not a row."""
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
    """Whether the connection broke, or the server ended it, for example after an idle timeout."""
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P", "25P03", "25P04"))


MIGRATION_CHECKS: Final = ("analytics_events_until", "analytics_metrics_until")
"""Constraints of a table that is being migrated; see migrate.py."""


def lacks_partition(error: psycopg.Error) -> bool:
    """Whether a row has to wait for its partition or for the end of a migration; the row is not at fault.

    Postgres reports both as 23514, the former without the name of a constraint (ExecFindPartition and
    ExecPartitionCheckEmitError in its source).
    """
    if error.sqlstate != _CHECK_VIOLATION or is_raised(error):
        return False
    return (error.diag.constraint_name or "") in ("", *MIGRATION_CHECKS)


def meets_new_partition(error: psycopg.Error) -> bool:
    """Whether the partition of a row was attached while the row waited for the default partition: retry."""
    return lacks_partition(error) and error.diag.source_function == _PARTITION_CHECK


def retry_pattern(*, distributed: bool) -> str:
    """Return a regular expression of Postgres for the codes that mean an outage; see `concerns_no_row`."""
    codes = [code for code, what in _ACTIONS.items() if what is Action.RETRY]
    return "^(" + "|".join([*codes, *_INTERNAL] if distributed else codes) + ")"


_ADVICE: Final = {
    "42P01": "run `loader init` first",
    "42703": "the schema version differs: run `loader init`",
    "42501": "run `loader init --role` with the loader's role, as the owner of the tables",
    "25006": "the server is read-only: connect to the primary",
}


_LOGIN_ADVICE: Final = {
    "password authentication failed": "check the user and the password of the DSN",
    "no password supplied": "put the password into the DSN, or into the file LOADER_DSN_FILE",
    "authentication failed": "allow this user with a line in pg_hba.conf, or change the DSN",
    "no pg_hba.conf entry": "allow this user with a line in pg_hba.conf, or change the DSN",
    'role ".*" does not exist': "create the role with `loader init --role`, or change the user of the DSN",
    'role ".*" is not permitted to log in': "ALTER ROLE ... LOGIN, as a superuser",
    'database ".*" does not exist': "change the database of the DSN, or create it",
    "permission denied for database": "GRANT CONNECT ON DATABASE ... TO the role, as the database's owner",
}
"""Patterns of login failures (SQLSTATE 28P01, 28000, 3D000, 42501) and their remedies. libpq does not pass on
the code of a failed login, only the text (https://www.postgresql.org/docs/current/libpq-connect.html)."""


_OUT_OF_REACH: Final = ("08", "57P01", "57P02", "57P03")
"""The connection broke, or the server is shutting down, has crashed or is starting."""


def advice(sqlstate: str | None) -> str:
    """Return the remedy for an error, or an empty string."""
    return _ADVICE.get(sqlstate or "", "")


def explain(error: psycopg.Error | OSError | LoaderError) -> LoaderError:
    """Return the LoaderError that describes this error, for a command or for a loader that waits."""
    if isinstance(error, LoaderError):
        return error
    if isinstance(error, OSError):
        return LoaderError(f"could not write rejects: {error}")
    message = error.diag.message_primary or "; ".join(filter(None, map(str.strip, str(error).splitlines())))
    message = message.removeprefix("connection failed: ").removeprefix("connection is bad: ")
    if error.sqlstate is None and (login := _login_advice(message)):
        return LoginRefusedError(f"the database refused the login: {message}: {login}")
    if error.sqlstate is None or error.sqlstate.startswith(_OUT_OF_REACH):
        return OutOfReachError(f"the database is out of reach: {message}")
    if action(error.sqlstate) is Action.RETRY:
        return OutOfReachError(f"the database cannot load at the moment: {message}")
    help_text = _partition_advice(error) if lacks_partition(error) else advice(error.sqlstate)
    return LoaderError(": ".join(filter(None, (message, help_text))))


def _partition_advice(error: psycopg.Error) -> str:
    if error.diag.constraint_name:
        return "`loader migrate` has not finished: run it again"
    return "create the partition, or a default partition"


def _login_advice(message: str) -> str:
    """Return the remedy if the message is a refused login, otherwise an empty string."""
    return next((what for pattern, what in _LOGIN_ADVICE.items() if re.search(pattern, message)), "")
