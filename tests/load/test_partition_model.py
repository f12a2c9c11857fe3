"""A model of partitions that are created, dropped and missing, during loads of ids of every kind.

Every line is a row once, a duplicate or a reject, or it waits in the spool; none is rejected because a partition
is missing.
"""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from psycopg.conninfo import make_conninfo

from loader.files import rejects
from loader.load import partitions
from loader.load.database import Connection
from loader.service import daemon
from loader.service.signals import Signals
from loader.service.workers import Workers
from tests import histories
from tests.load.lines import STEM, event, joined, metric, number, rows
from tests.load.test_partitions import IDS, id_of
from tests.servers import ROLE
from tests.servers import database as fresh_database

NOW = datetime.now(UTC)
DAYS = (-500, -90, -89, -3, -1, 0, 1, 20, 60)
an_id = st.one_of(
    st.builds(lambda day, n: id_of(NOW + timedelta(days=day), n), st.sampled_from(DAYS), st.integers(0, 3)),
    st.builds(lambda name, n: IDS[name](n), st.sampled_from(sorted(IDS)), st.integers(0, 3)),
)
a_line = st.tuples(st.sampled_from([event, metric]), an_id, st.integers(0, 1))
DEFAULT = "CREATE TABLE analytics_{0}_default PARTITION OF analytics_{0} DEFAULT"


class PartitionModel(RuleBasedStateMachine):
    """Rows by table and key with their payload, and the files that wait."""

    connection: Connection
    home: Path

    @initialize()
    def begin(self) -> None:
        self.stored: dict[tuple[str, str], int] = {}
        self.duplicates = self.rejected = self.files = 0
        self.waiting: dict[str, list[tuple[str, str, int]]] = {}
        self.has_default = {"events": True, "metrics": True}
        self.spool = self.home / f"spool-{len(list(self.home.iterdir()))}"
        self.spool.mkdir()
        for kind in self.has_default:
            self.execute(
                f"CREATE TABLE IF NOT EXISTS analytics_{kind}_default PARTITION OF analytics_{kind} DEFAULT"
            )
        self.execute("TRUNCATE analytics_events, analytics_metrics, analytics_loads")

    @rule(lines=st.lists(a_line, min_size=1, max_size=12))
    def seal(self, lines: list[tuple[object, str, int]]) -> None:
        self.files += 1
        name = f"{STEM.format(self.files)}.ndjson"
        written = [
            event(0, event_id=id_, metadata={"payload": payload}) if make is event
            else metric(0, event_id=id_, value=payload)
            for make, id_, payload in lines
        ]  # fmt: skip
        self.waiting[name] = [
            ("events" if make is event else "metrics", id_, payload) for make, id_, payload in lines
        ]
        (self.spool / name).write_bytes(joined(*written, event(self.files, event_type="Not Snake")))

    @rule()
    def load(self) -> None:
        workers = Workers(
            lambda: make_conninfo(self.connection.info.dsn, user=ROLE), self.spool, 1, Signals(), patience=0
        )
        with closing(workers):
            _, report = daemon.once(self.spool, workers, None)
        covered = self.covered()
        for name, lines in sorted(self.waiting.items()):
            if all(self.has_default[kind] or self.has_place(covered[kind], id_) for kind, id_, _ in lines):
                assert name not in report.failures
                self.take(lines)
                del self.waiting[name]
        assert set(report.failures) == set(self.waiting)
        assert all("no partition" in reason for reason in report.failures.values())

    def take(self, lines: list[tuple[str, str, int]]) -> None:
        self.rejected += 1  # the name that is not in snake case
        for kind, id_, payload in lines:
            stored = self.stored.setdefault((kind, id_), -1)
            if stored == -1:
                self.stored[kind, id_] = payload
            elif stored == payload:
                self.duplicates += 1
            else:
                self.rejected += 1

    @rule(day=st.sampled_from(DAYS), days=st.integers(1, 3))
    def make(self, day: int, days: int) -> None:
        since = NOW + timedelta(days=day)
        if all(self.has_default.values()):
            partitions.make(self.connection, since, since + timedelta(days=days))

    @rule()
    def make_what_is_due(self) -> None:
        if all(self.has_default.values()):
            partitions.make(self.connection)
            for kind in self.has_default:
                latest = NOW + timedelta(days=partitions.RUNWAY_DAYS)
                left = rows(self.connection, f"SELECT {self.key(kind)}::text FROM analytics_{kind}_default")
                assert all(id_[14] != "7" or id_ > id_of(latest) for (id_,) in left)
                self.connection.commit()

    @rule(kind=st.sampled_from(["events", "metrics"]), choice=st.integers(0, 100))
    def drop_a_partition(self, kind: str, choice: int) -> None:
        """Drop a partition with its rows, like a prune."""
        divided = [name for (name, low, high) in self.covered()[kind] if low and high]
        if divided:
            name = divided[choice % len(divided)]
            gone = rows(self.connection, f"SELECT {self.key(kind)}::text FROM {name}")
            for (id_,) in gone:
                del self.stored[kind, id_]
            self.execute(f"DROP TABLE {name}")

    @precondition(lambda self: all(self.has_default.values()))
    @rule(kind=st.sampled_from(["events", "metrics"]))
    def lose_the_default_partition(self, kind: str) -> None:
        for (id_,) in rows(self.connection, f"SELECT {self.key(kind)}::text FROM analytics_{kind}_default"):
            del self.stored[kind, id_]
        self.execute(f"DROP TABLE analytics_{kind}_default")
        self.has_default[kind] = False

    @precondition(lambda self: not all(self.has_default.values()))
    @rule()
    def create_the_default_partition(self) -> None:
        for kind in [kind for kind, has in self.has_default.items() if not has]:
            self.execute(DEFAULT.format(kind))
            self.has_default[kind] = True

    @invariant()
    def every_line_is_a_row_once_a_duplicate_or_a_reject(self) -> None:
        if not hasattr(self, "spool"):
            return
        events = rows(
            self.connection, "SELECT event_id::text, (metadata->>'payload')::int FROM analytics_events"
        )
        metrics = rows(self.connection, "SELECT id::text, value::int FROM analytics_metrics")
        found = [(("events", id_), payload) for id_, payload in events]
        found += [(("metrics", id_), payload) for id_, payload in metrics]
        assert sorted(found) == sorted(self.stored.items())
        codes = [each.code for path in rejects.files(self.spool) for each in rejects.read(path)]
        assert len(codes) == self.rejected and set(codes) <= {"invalid_name", "collision"}
        assert (
            number(self.connection, "SELECT coalesce(sum(duplicates), 0) FROM analytics_loads")
            == self.duplicates
        )
        self.connection.commit()

    # ---- invariants ------------------------------------------------------------------------------

    def covered(self) -> dict[str, list[tuple[str, UUID | None, UUID | None]]]:
        bounds = "SELECT partition::text, low, high FROM analytics_partitions('{}') WHERE NOT is_default"
        found = {kind: rows(self.connection, bounds.format(kind)) for kind in self.has_default}
        self.connection.commit()
        return found

    def has_place(self, covered: list[tuple[str, UUID | None, UUID | None]], id_: str) -> bool:
        key = UUID(id_)
        return any((low is None or low <= key) and (high is None or key < high) for _, low, high in covered)

    def key(self, kind: str) -> str:
        return "event_id" if kind == "events" else "id"

    def execute(self, statement: str) -> None:
        self.connection.execute(statement.encode())
        self.connection.commit()


def check(server: str, home: Path, examples: int) -> None:
    with fresh_database(server, "partitioned") as dsn, psycopg.connect(dsn) as connection:
        model = type("Model", (PartitionModel,), {"connection": connection, "home": home})
        histories.check(model, examples, steps=20)
        connection.rollback()


def test_no_line_is_rejected_because_a_partition_is_missing(one_server: str, tmp_path: Path) -> None:
    check(one_server, tmp_path, 4)


@pytest.mark.long
def test_no_line_is_rejected_because_a_partition_is_missing_in_many_histories(
    server: str, tmp_path: Path
) -> None:
    check(server, tmp_path, 150)
