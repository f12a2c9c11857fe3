"""What becomes of the lines of one chunk: decoded here, counted and rejected by whoever inserts them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import orjson

from loader.files.chunk import Chunk
from loader.files.rejects import Rejected
from loader.load import lowwater
from loader.load.counts import Counts, Loaded
from loader.load.decode import Reject, Row, decode
from loader.load.ledger import Entry
from loader.load.tables import EVENTS
from spool.metric_names import DROPPED_METRIC

OVERSIZE: Final = "oversize"
"""Code of a line longer than a chunk: its reject holds its beginning only, so it cannot be retried."""

BLANK: Final = "empty"
"""Code of a line without a character that is not a blank: not a line, so it is not counted."""


_DROPPED: Final = f"{DROPPED_METRIC}\t"
_AFTER_ID: Final = len("0190163d-8694-739b-aea5-966c26f8ad91\t")
_LONGEST_NAME: Final = 100


@dataclass
class Outcome:
    """The counts and rejects of one chunk so far."""

    chunk: Chunk
    marks: lowwater.Marks = field(default_factory=dict)
    events: int = 0
    metrics: int = 0
    duplicates: int = 0
    expired: int = 0
    rejects: list[Rejected] = field(default_factory=list)
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    event_hours: set[str] = field(default_factory=set)
    metric_hours: set[str] = field(default_factory=set)
    """The hours of the rows that are new, as in `Row.hour`."""

    @property
    def counts(self) -> Counts:
        return Counts(self.events, self.metrics, self.duplicates, len(self.rejects), self.expired)

    def loaded(self) -> Loaded:
        return Loaded(self.counts, bytes=self.chunk.size, dropped=self.dropped)

    def entry(self) -> Entry:
        """Return the chunk's row of the ledger."""
        chunk = self.chunk
        return Entry(chunk.digest, chunk.file, chunk.offset, chunk.size, self.counts)

    def insert(self, row: Row) -> None:
        """Count a row that is new, and note its hour."""
        if row.table is EVENTS:
            self.events += 1
            self.event_hours.add(row.hour)
        else:
            self.metrics += 1
            self.metric_hours.add(row.hour)
            if row.copy.startswith(_DROPPED, _AFTER_ID):
                self._count_dropped(row.copy)

    def _count_dropped(self, copy: str) -> None:
        """Count what a metric reports; one that somebody else wrote may have any value and labels."""
        with contextlib.suppress(ValueError, OverflowError, AttributeError):
            _, _, _, value, labels, _ = copy.split("\t")
            kind = orjson.loads(labels.replace("\\\\", "\\"))
            cause, name = (str(kind.get(label))[:_LONGEST_NAME] for label in ("cause", "name"))
            self.dropped[cause, name] += int(float(value))

    def reject(self, line: int, raw: bytes, reject: Reject) -> None:
        self.rejects.append(Rejected(self.chunk.file, line, reject.code, reject.reason, raw))

    def sort_rejects(self) -> None:
        """Put the rejects in the order of their lines."""
        self.rejects.sort(key=lambda rejected: rejected.line)


class Line(msgspec.Struct, frozen=True, gc=False):
    """A line that has a row."""

    outcome: Outcome
    number: int
    raw: bytes
    row: Row

    def insert(self) -> None:
        self.outcome.insert(self.row)

    def reject(self, reject: Reject) -> None:
        self.outcome.reject(self.number, self.raw, reject)


def decoded(outcomes: Sequence[Outcome]) -> Iterator[Line]:
    """Yield the lines of the chunks that have a row; the others are rejected, or counted as expired."""
    for outcome in outcomes:
        yield from decoded_lines(outcome, outcome.chunk.lines())


def decoded_lines(outcome: Outcome, lines: Iterable[bytes]) -> Iterator[Line]:
    """As `decoded`, for given lines that are those of the outcome's chunk."""
    chunk = outcome.chunk
    marks = lowwater.NONE if chunk.keep_expired else outcome.marks
    for number, raw in enumerate(lines, chunk.first_line):
        row = _oversize(chunk) if chunk.oversize else decode(raw)
        if isinstance(row, Row):
            if (mark := marks.get(row.table)) is not None and mark.expires(row):
                outcome.expired += 1
            else:
                yield Line(outcome, number, raw, row)
        elif row.code != BLANK:
            outcome.reject(number, raw, row)


def _oversize(chunk: Chunk) -> Reject:
    return Reject(
        OVERSIZE, f"the line has {chunk.size} bytes; only its beginning is here, the whole is in the file"
    )
