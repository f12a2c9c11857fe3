"""The outcome of the lines of one chunk: decoded here, counted and rejected by the code that inserts them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import orjson

from loader.files.chunk import Chunk
from loader.files.mentions import ERASED_LINE, is_erased
from loader.files.rejects import Rejected
from loader.load import lowwater
from loader.load.counts import Counts, Loaded
from loader.load.decode import ERASED, Reject, Row, decode
from loader.load.erasures import Erasures
from loader.load.ledger import Entry
from loader.load.tables import EVENTS
from spool.metric_names import DROPPED_METRIC

OVERSIZE: Final = "oversize"
"""Reject code of a line longer than a chunk. The reject holds only its beginning, so it cannot be retried."""

BLANK: Final = "empty"
"""Reject code of a blank line, which is not counted as a line."""


_DROPPED: Final = f"{DROPPED_METRIC}\t"
_AFTER_ID: Final = len("0190163d-8694-739b-aea5-966c26f8ad91\t")
_LONGEST_NAME: Final = 100


@dataclass
class Outcome:
    """The counts and rejects of one chunk so far."""

    chunk: Chunk
    erasures: Erasures | None = None
    """The erased people; None for tables that do not record them."""
    marks: lowwater.Marks = field(default_factory=dict)
    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    erased: int = 0
    expired: int = 0
    rejects: list[Rejected] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    event_hours: set[str] = field(default_factory=set)
    metric_hours: set[str] = field(default_factory=set)
    """The hours of the new rows, as in `Row.hour`."""

    @property
    def counts(self) -> Counts:
        return Counts(
            self.events, self.metrics, self.duplicates, len(self.rejects), self.erased, self.expired
        )

    def loaded(self) -> Loaded:
        return Loaded(self.counts, bytes=self.chunk.size, dropped=self.dropped)

    def entry(self) -> Entry:
        """Return the chunk's ledger row."""
        chunk = self.chunk
        return Entry(chunk.digest, chunk.file, chunk.offset, chunk.size, self.counts)

    def insert(self, row: Row) -> None:
        """Count a new row and record its hour."""
        if row.table is EVENTS:
            self.events += 1
            self.event_hours.add(row.hour)
        else:
            self.metrics += 1
            self.metric_hours.add(row.hour)
            if row.copy.startswith(_DROPPED, _AFTER_ID):
                self._count_dropped(row.copy)

    def _count_dropped(self, copy: str) -> None:
        """Count the drops reported by a metric. A metric from another source may have any value and labels."""
        with contextlib.suppress(ValueError, OverflowError, AttributeError):
            _, _, _, value, labels, _ = copy.split("\t")
            kind = orjson.loads(labels.replace("\\\\", "\\"))
            cause, name = (str(kind.get(label))[:_LONGEST_NAME] for label in ("cause", "name"))
            self.dropped[cause, name] += int(float(value))

    def reject(self, line: int, raw: bytes, reject: Reject) -> None:
        self.rejects.append(Rejected(self.chunk.file, line, reject.code, reject.reason, raw))

    def sort_rejects(self) -> None:
        """Sort the rejects by line number."""
        self.rejects.sort(key=lambda rejected: rejected.line)


class Line(msgspec.Struct, frozen=True, gc=False):
    """A line with a row."""

    outcome: Outcome
    number: int
    raw: bytes
    row: Row

    def insert(self) -> None:
        self.outcome.insert(self.row)

    def reject(self, reject: Reject) -> None:
        self.outcome.reject(self.number, self.raw, reject)


def decoded(outcomes: Sequence[Outcome]) -> Iterator[Line]:
    """Yield the lines of the chunks that have a row; reject the others, or count them as erased or expired."""
    for outcome in outcomes:
        lines, erasures = outcome.chunk.lines(), outcome.erasures
        # The whole chunk is searched first, because few chunks mention an erased person.
        if erasures and erasures.concern(outcome.chunk.data):
            lines = kept_lines(erasures, lines)
        yield from decoded_lines(outcome, lines)


def kept_lines(erasures: Erasures | None, lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines without the data of erased people."""
    for line in lines:
        kept = erasures.applied(line) if erasures else line
        yield ERASED_LINE if kept is None else kept


def decoded_lines(outcome: Outcome, lines: Iterable[bytes]) -> Iterator[Line]:
    """Do as `decoded`, for the given lines of the outcome's chunk."""
    chunk = outcome.chunk
    marks = lowwater.NONE if chunk.keep_expired else outcome.marks
    for number, raw in enumerate(lines, chunk.first_line):
        row = _oversize(chunk) if chunk.oversize and not is_erased(raw) else decode(raw)
        if isinstance(row, Row):
            if (mark := marks.get(row.table)) is not None and mark.expires(row):
                outcome.expired += 1
            else:
                yield Line(outcome, number, raw, row)
        elif row.code == ERASED and outcome.erasures is not None:
            outcome.erased += 1
        elif row.code != BLANK:
            outcome.reject(number, raw, row)


def _oversize(chunk: Chunk) -> Reject:
    return Reject(
        OVERSIZE,
        f"the line has {chunk.size} bytes; this is only its beginning, the whole line is in the file",
    )
