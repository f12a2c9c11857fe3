"""A model of the loader: files are copied, torn, repeated, refused or retried in any order; in the end each line is
in exactly one place, and the tables, the ledger and the rejects match a dictionary and two counters.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)
from psycopg.conninfo import make_conninfo

from loader.files import rejects
from loader.load.batch import retry
from loader.load.database import Connection
from loader.operate import backfill
from loader.service import daemon
from loader.service.signals import Signals
from loader.service.workers import Workers
from tests import histories
from tests.load.lines import STEM, event, joined, metric, number, rows
from tests.servers import ROLE

FORBIDDEN = "forbidden_type"
CHECK = f"ADD CONSTRAINT allowed CHECK (event_type <> '{FORBIDDEN}') NOT VALID"
NO_CHECK = "DROP CONSTRAINT IF EXISTS allowed"
BROKEN = (b"{broken", b'{"event_id": 7}', b"", b"\xff")


def line_of(what: str, number: int, payload: int) -> bytes:
    if what == "event":
        return event(number, metadata={"payload": payload})
    if what == "metric":
        return metric(number, value=payload)
    if what == "forbidden":
        return event(number, event_type=FORBIDDEN, metadata={"payload": payload})
    return BROKEN[number % len(BROKEN)]


a_line = st.builds(
    line_of,
    st.sampled_from(["event", "event", "metric", "forbidden", "broken"]),
    st.integers(0, 7),
    st.integers(0, 1),
)
some_lines = st.lists(a_line, max_size=8)


class Expected:
    """The expected outcome of the lines loaded so far."""

    def __init__(self) -> None:
        self.taken: dict[bytes, bytes] = {}
        """The line that holds each key: the bytes up to the end of the id, and its table."""
        self.known: set[bytes] = set()
        self.rejected: Counter[bytes] = Counter()
        self.duplicates = 0
        self.forbids = True

    def lines(self, lines: Sequence[bytes]) -> list[bytes]:
        """Add lines; return the rejected ones."""
        refused = []
        for line in lines:
            if not line:
                continue  # a blank line is not a line
            key = (b"m" if b"metric_name" in line else b"e") + line[:52]
            if self.taken.get(key) == line:
                self.duplicates += 1
            elif key in self.taken or line in BROKEN or (self.forbids and FORBIDDEN.encode() in line):
                refused.append(line)
            else:
                self.taken[key] = line
        return refused

    def files(self, files: Sequence[bytes]) -> None:
        for data in files:
            if data not in self.known and data:
                self.known.add(data)
                self.rejected.update(self.lines(split(data)))

    def file_without_rejects(self, data: bytes) -> bool:
        """Add a file unless one of its lines is rejected; return whether it was added."""
        after = self.copy()
        after.files([data])
        if after.rejected != self.rejected:
            return False
        self.__dict__ |= after.__dict__
        return True

    def copy(self) -> Expected:
        other = Expected()
        other.__dict__ |= {
            name: value.copy() if hasattr(value, "copy") else value for name, value in self.__dict__.items()
        }
        return other


def split(data: bytes) -> list[bytes]:
    return data.removesuffix(b"\n").split(b"\n")


class LoaderModel(RuleBasedStateMachine):
    connection: Connection
    home: Path

    contents = Bundle("contents")

    @initialize()
    def begin(self) -> None:
        self.expected = Expected()
        self.waiting: dict[str, bytes] = {}
        self.files = 0
        self.spool = self.home / f"spool{len(list(self.home.iterdir()))}"
        self.spool.mkdir()
        self.owner("TRUNCATE analytics_events, analytics_metrics, analytics_loads")
        self.owner(f"ALTER TABLE analytics_events {NO_CHECK}; ALTER TABLE analytics_events {CHECK}")

    def owner(self, statement: str) -> None:
        self.connection.execute(statement.encode())
        self.connection.commit()

    def dsn(self) -> str:
        return make_conninfo(self.connection.info.dsn, user=ROLE)

    def name(self) -> str:
        self.files += 1
        return STEM.format(self.files)

    # ---- what lies in the spool -----------------------------------------------------------------------

    @rule(target=contents, lines=some_lines)
    def seal(self, lines: list[bytes]) -> bytes:
        data = joined(*lines)
        self.put(f"{self.name()}.ndjson", data)
        return data

    @rule(data=contents)
    def meet_again(self, data: bytes) -> None:
        """Add a copy of a file that waits, or that was loaded before."""
        self.put(f"{self.name()}.ndjson", data)

    @rule(target=contents, first=contents, second=contents)
    def join(self, first: bytes, second: bytes) -> bytes:
        """Add the same lines in another file."""
        self.put(f"{self.name()}.ndjson", first + second)
        return first + second

    @rule(lines=some_lines, tail=st.sampled_from([b"", b'{"cut', b"\0" * 50, b'{"c\0\0\0']))
    def leave_behind(self, lines: list[bytes], tail: bytes) -> None:
        """Add a segment of a dead writer: its whole lines count."""
        stem = self.name()
        whole = joined(*[line for line in lines if line])  # writers never write an empty line
        (self.spool / f"{stem}.open").write_bytes(whole + tail)
        self.waiting[f"{stem}.ndjson"] = whole

    def put(self, name: str, data: bytes) -> None:
        (self.spool / name).write_bytes(data)
        self.waiting[name] = data

    # ---- what the loader is asked ---------------------------------------------------------------------

    @rule()
    def load(self) -> None:
        self.expected.files([self.waiting[name] for name in sorted(self.waiting)])
        self.waiting.clear()
        with closing(self.workers()) as workers:
            daemon.once(self.spool, workers, None)

    @rule()
    def load_while_rejects_cant_be_written(self) -> None:
        """Load while rejects cannot be written: files without a reject are loaded, the others stay."""
        (self.spool / rejects.DIRECTORY).mkdir(exist_ok=True)
        (self.spool / rejects.DIRECTORY).rename(self.spool / "aside")
        (self.spool / rejects.DIRECTORY).write_bytes(b"")
        with closing(self.workers()) as workers:
            _, report = daemon.once(self.spool, workers, None)
        self.waiting = {
            name: self.waiting[name]
            for name in sorted(self.waiting)
            if not self.expected.file_without_rejects(self.waiting[name])
        }
        assert set(report.failures) == set(self.waiting)
        (self.spool / rejects.DIRECTORY).unlink()
        (self.spool / "aside").rename(self.spool / rejects.DIRECTORY)

    @rule(data=contents, packed=st.booleans())
    def backfill(self, data: bytes, packed: bool) -> None:
        path = self.home / (f"{self.name()}.ndjson" + (".gz" if packed else ""))
        path.write_bytes(gzip.compress(data) if packed else data)
        with closing(self.workers()) as workers:
            report = workers.load(backfill.find([str(path)]).files)
        if report.failures:  # a backfill refuses a file that does not start with an object
            assert not any(line.startswith(b"{") for line in split(data))
        else:
            self.expected.files([data])
        assert path.exists()

    @rule()
    def retry_rejects(self) -> None:
        for path in rejects.files(self.spool):
            lines = [rejected.raw for rejected in rejects.read(path)]
            self.expected.rejected.subtract(lines)
            self.expected.rejected.update(self.expected.lines(lines))
            with self.connection.transaction():
                retry(self.connection, path)

    @rule(forbids=st.booleans())
    def change_what_is_allowed(self, forbids: bool) -> None:
        self.expected.forbids = forbids
        self.owner(f"ALTER TABLE analytics_events {NO_CHECK}")
        if forbids:
            self.owner(f"ALTER TABLE analytics_events {CHECK}")

    def workers(self) -> Workers:
        return Workers(self.dsn, self.spool, 1, Signals(), patience=0)

    # ---- what must hold -------------------------------------------------------------------------------

    @invariant()
    def every_line_is_where_it_belongs(self) -> None:
        if not hasattr(self, "spool"):
            return
        events = rows(
            self.connection, "SELECT event_id::text, event_type, metadata->>'payload' FROM analytics_events"
        )
        metrics = rows(self.connection, "SELECT id::text, value FROM analytics_metrics")
        expected = list(self.expected.taken.values())
        assert len(events) + len(metrics) == len(expected)
        assert {line for line in expected if b"metric_name" in line} == {
            metric(int(id_[-12:], 16), value=int(value)) for id_, value in metrics
        }
        assert {line for line in expected if b"metric_name" not in line} == {
            event(int(id_[-12:], 16), event_type=kind, metadata={"payload": int(payload)})
            for id_, kind, payload in events
        }
        kept = Counter(each.raw for path in rejects.files(self.spool) for each in rejects.read(path))
        assert kept == +self.expected.rejected
        loads = "SELECT coalesce(sum({}), 0) FROM analytics_loads"
        assert number(self.connection, loads.format("events + metrics")) == len(expected)
        assert number(self.connection, loads.format("duplicates")) == self.expected.duplicates
        assert {path.name for path in self.spool.glob("*.ndjson")} | {
            f"{path.stem}.ndjson" for path in self.spool.glob("*.open")
        } == set(self.waiting)


def check(connection: Connection, home: Path, examples: int) -> None:
    model = type("Model", (LoaderModel,), {"connection": connection, "home": home})
    histories.check(model, examples, steps=25)


def test_the_loader_does_what_a_dictionary_and_two_counters_say(
    one_connection: Connection, tmp_path: Path
) -> None:
    check(one_connection, tmp_path, 15)


@pytest.mark.long
def test_the_loader_matches_a_dictionary_and_two_counters_in_many_histories(
    one_connection: Connection, tmp_path: Path
) -> None:
    check(one_connection, tmp_path, 400)
