"""The line contract: whatever its bytes, each line becomes one row, duplicate or reject, and the ledger adds up."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader.files import rejects
from loader.load.batch import load
from loader.load.database import Connection
from tests.load.lines import EVENT, METRIC, chunk, event, metric, number

texts = st.text(max_size=30) | st.sampled_from(
    ["\0", "\\u0000", "\ud83d", "\t", "\\N", "\\.", "\r", "é", "x" * 200]
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def dumps(value: object) -> bytes:
    """Encode with Python's json, which also writes NaN and lone surrogates."""
    return json.dumps(value).encode()


@st.composite
def near_valid(draw: st.DrawFn) -> bytes:
    """Return a valid event or metric with some fields changed, omitted, added, or in another form."""
    record = dict(draw(st.sampled_from([EVENT, METRIC])))
    record["event_id"] = f"0190163d-8694-739b-aea5-{draw(st.integers(0, 5)):012x}"
    for key in draw(st.sets(st.sampled_from([*EVENT, *METRIC, "more"]), max_size=2)):
        if draw(st.booleans()):
            record[key] = draw(json_values)
        else:
            record.pop(key, None)
    line = (
        dumps(record)
        if draw(st.booleans())
        else orjson.dumps(EVENT | {"metadata": {"n": draw(st.integers(0, 3))}})
    )
    return line[: draw(st.integers(0, len(line)))] if draw(st.integers(0, 9)) == 0 else line


lines = (
    st.binary(max_size=60)
    | json_values.map(dumps)
    | near_valid()
    | st.integers(0, 5).map(event)
    | st.integers(0, 5).map(metric)
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.lists(lines.map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_every_line_ends_in_exactly_one_place(
    one_connection: Connection,
    tmp_path_factory: pytest.TempPathFactory,
    given_lines: Sequence[bytes],
    duplicates: float,
) -> None:
    spool = tmp_path_factory.mktemp("spool")
    one_connection.execute("SET ROLE analytics_loader")
    before = counted(one_connection)
    tally = load(one_connection, [chunk(*given_lines)], spool, duplicates)
    after = counted(one_connection)
    written = sum(
        1 for line in given_lines if line.removeprefix(codecs.BOM_UTF8).strip()
    )  # a blank line is not counted
    assert tally.counts.lines == written or tally.known == len(given_lines)
    assert (after[0] - before[0], after[1] - before[1]) == (tally.counts.events, tally.counts.metrics)
    kept = [each for path in rejects.files(spool) for each in rejects.read(path)]
    assert len(kept) == tally.counts.rejected
    assert all(each.raw == given_lines[each.line - 1] and each.reason for each in kept)


def counted(connection: Connection) -> tuple[int, int]:
    return (
        number(connection, "SELECT count(*) FROM analytics_events"),
        number(connection, "SELECT count(*) FROM analytics_metrics"),
    )


def test_the_ledger_itself_refuses_a_sum_that_does_not_hold(one_connection: Connection) -> None:
    with pytest.raises(psycopg.errors.CheckViolation), one_connection.transaction():
        one_connection.execute(
            "INSERT INTO analytics_loads VALUES ('x', 'f', 0, 9, 3, 1, 0, 0, 1, 'host', now())"
        )
