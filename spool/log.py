"""The package's logger, "spool", also for applications whose logging configuration does not mention it.

`logging.config.dictConfig`, which Django's LOGGING goes through, disables every logger that exists unless
`disable_existing_loggers` is false. The warnings of this package would vanish although nobody chose that. So
a disabled logger is replaced by one of the same name that no configuration knows: its records go to the root
logger's handlers or, if there are none, to standard error (logging's last resort). To silence the package, set
the level of the logger "spool" and keep it enabled.
"""

from __future__ import annotations

import logging

_NAMED = logging.getLogger("spool")
_UNKNOWN = logging.Logger("spool")  # noqa: LOG001  # getLogger would make it known
_UNKNOWN.parent = logging.root


def logger() -> logging.Logger:
    """Return the logger to use now."""
    return _UNKNOWN if _NAMED.disabled else _NAMED
