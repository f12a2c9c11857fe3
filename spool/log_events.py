"""Emits selected log records as events: a handler for `logging`, and a processor for structlog (not imported).

    logging.getLogger("family").addHandler(EventHandler())
    logger.info("album shared", extra={"analytics_event": "album_shared", "album_id": album.id})

    structlog.configure(processors=[..., event_processor(), structlog.processors.JSONRenderer()])
    logger.info("album shared", analytics_event="album_shared", album_id=album.id)

A record with the key `analytics_event` is an event of that type. Its other keys are the metadata, except for
`user_id`, `family_unit_id`, `session_id`, `event_id` and `timestamp`, which are arguments of `emit_event`;
the bound context is added. Records without the key are ignored, unless a function `choose` returns the
arguments of an event for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

from spool.declare import WHO
from spool.emitter import Emitter, get_emitter

_ARGUMENTS: Final = frozenset({"event_type", "metadata", *WHO})
KEY: Final = "analytics_event"
"""The key of a record that holds the event type."""

Choose = Callable[[Any], Mapping[str, Any] | None]
"""A function of a record that returns the arguments of `emit_event`, or None for a record that is not an event."""

_OF_LOGGING: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
_OF_STRUCTLOG: Final = frozenset(
    {"event", "level", "logger", "logger_name", "exc_info", "stack_info", "exception"}
)


class EventHandler(logging.Handler):
    """Emits an event for each selected record. Other handlers are not affected.

    It takes no lock, and raises nothing but ValueError with `SPOOL_STRICT=1`. Records of the logger `spool`,
    which reports dropped lines, are never emitted.
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
        """Emit the record if it passes the filters; `logging.Handler` does the same, but under a lock."""
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "spool":
            _emit(self._emitter or get_emitter(), self._choose, record)


def event_processor(*, emitter: Emitter | None = None, choose: Choose | None = None) -> Any:
    """Return a structlog processor that emits an event for each selected entry.

    The entry is passed to the next processor without the key `analytics_event`; `choose` receives a copy.
    Place the processor before the renderer.
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
    # structlog's own timestamp is the time of logging, as text or a number: the emitter's is more precise.
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
    """Emit the record's event, if it has one; return whether it has. A failure is counted as a drop."""
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
