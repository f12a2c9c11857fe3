"""Chosen log records as events: a handler for `logging` and a processor for structlog, which is not imported.

    logging.getLogger("family").addHandler(EventHandler())
    logger.info("album shared", extra={"analytics_event": "album_shared", "album_id": album.id})

    structlog.configure(processors=[..., event_processor(), structlog.processors.JSONRenderer()])
    logger.info("album shared", analytics_event="album_shared", album_id=album.id)

A record with the key `analytics_event` is an event of that type. Its other keys are the metadata, except for
`user_id`, `family_unit_id`, `session_id`, `event_id` and `timestamp`, which are arguments of `emit_event`, and what
is bound to the context is added. Records without the key are left alone, unless a function `choose` makes
the arguments of an event from them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

from spool.declare import WHO
from spool.emitter import Emitter, get_emitter

_ARGUMENTS: Final = frozenset({"event_type", "metadata", *WHO})
KEY: Final = "analytics_event"
"""Key of the event's type in a record."""

Choose = Callable[[Any], Mapping[str, Any] | None]
"""A function of a record that returns the arguments of `emit_event`, or None for a record that is not an event."""

_OF_LOGGING: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
_OF_STRUCTLOG: Final = frozenset(
    {"event", "level", "logger", "logger_name", "exc_info", "stack_info", "exception"}
)


class EventHandler(logging.Handler):
    """Emits an event for each record that is chosen; what the handlers beside it do is not changed.

    It takes no lock, and raises nothing but ValueError with `SPOOL_STRICT=1`. Records of the logger `spool`, which
    reports what could not be emitted, are never events.
    """

    def __init__(
        self,
        level: int | str = logging.NOTSET,
        *,
        emitter: Emitter | None = None,
        choose: Choose | None = None,
    ) -> None:
        super().__init__(level)
        self._emitter = emitter
        self._choose = choose or _chosen_record

    def createLock(self) -> None:  # noqa: N802  # of logging
        self.lock = None

    def handle(self, record: logging.LogRecord) -> Any:
        """Emit the record if it passes the filters, as `logging.Handler` does within its lock."""
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "spool":
            _emit(self._emitter or get_emitter(), self._choose, record)


def event_processor(*, emitter: Emitter | None = None, choose: Choose | None = None) -> Any:
    """Return a processor of structlog that emits an event for each entry that is chosen.

    The entry goes on to the next processor without the key `analytics_event`. `choose` gets a copy of it. Place
    the processor before the one that renders.
    """
    chosen = choose or _chosen_entry

    def process(logger: object, method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if _emit(emitter or get_emitter(), chosen, dict(entry)):
            entry.pop(KEY, None)
        return entry

    return process


def _chosen_record(record: logging.LogRecord) -> dict[str, Any] | None:
    values = vars(record)
    return _arguments(values, _OF_LOGGING) if KEY in values else None


def _chosen_entry(entry: dict[str, Any]) -> dict[str, Any] | None:
    if KEY not in entry:
        return None
    # structlog's own timestamp is text or a number, and is when it was logged: the emitter has a better one.
    stamped = (
        frozenset({"timestamp"}) if isinstance(entry.get("timestamp"), (str, float, int)) else frozenset()
    )
    return _arguments(entry, _OF_STRUCTLOG | stamped)


def _arguments(values: Mapping[str, Any], not_metadata: frozenset[str]) -> dict[str, Any]:
    left = {
        key: value for key, value in values.items() if key not in not_metadata and not key.startswith("_")
    }
    return {
        "event_type": left.pop(KEY),
        **{name: left.pop(name) for name in WHO if name in left},
        "metadata": left,
    }


def _emit(emitter: Emitter, choose: Choose, record: Any) -> bool:
    """Emit the event that a record is, if it is one, and return whether it is. A failure is a counted drop."""
    try:
        arguments = choose(record)
        if arguments is None:
            return False
        if "event_type" not in arguments or not _ARGUMENTS.issuperset(arguments):
            raise TypeError(
                f"an event has the arguments event_type, metadata and {', '.join(WHO)}, not {arguments!r}"
            )
    except Exception as error:
        emitter.refuse(error)
        return False
    emitter.emit_event(**arguments)
    return True
