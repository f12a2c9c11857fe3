"""The ledger stays small: rows of segments are merged, and everything that depends on them works as before."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import orjson
import pytest

from loader.files import writers
from loader.load import ledger
from loader.load.database import Connection
from spool import Emitter
from tests.emit.lines import emit
from tests.load.lines import STEM, event, number, rows, segment
from tests.operate.test_doctor import examined
from tests.processes import Cli, eventually

AGE = "UPDATE analytics_loads SET loaded_at = loaded_at - interval '3 hours' WHERE digests IS NULL"
SUMS = (
    "SELECT sum(lines), sum(events), sum(metrics), sum(duplicates), sum(rejected), sum(expired), sum(segments) "
    "FROM analytics_loads"
)
CONSERVATION = "SELECT * FROM analytics_conservation ORDER BY writer"
MISSING = "SELECT * FROM analytics_missing_segments ORDER BY 1, 2"
LEDGER_ROWS = "SELECT count(*) FROM analytics_loads"
EVENTS = "SELECT count(*) FROM analytics_events"
A_DAY = """
    INSERT INTO analytics_loads
        (digest, file, byte_offset, bytes, lines, events, metrics, duplicates, rejected, loader_host, loaded_at)
    SELECT pg_catalog.sha256(format('%%s %%s %%s', day, worker, second)::bytea),
        format('20260120T120000.000000Z-web-host-1-0a1b2c3d-%%s-deadbeef-%%s.ndjson', worker,
            lpad((day * 86400 + second)::text, 6, '0')),
        0, 28000, 100, 50, 50, 0, 0, 'web-host-1', now() - interval '4 days' + make_interval(days => day, secs => second)
    FROM generate_series(1, 4) AS worker, generate_series(1, 86400) AS second, (SELECT %s::int AS day) AS chosen
"""
SIZE = "SELECT pg_total_relation_size('analytics_loads')"


def merged(connection: Connection) -> int:
    """Make the rows some hours older, and merge; return the number of merged rows."""
    connection.execute(AGE.encode())
    connection.commit()
    return ledger.merge(connection)


def copy(path: Path, name: Path) -> Path:
    return Path(shutil.copy(path, name))


def load_segments(cli: Cli, *numbers: int) -> list[Path]:
    """Load segments of a row, a duplicate and a reject each; return copies of them."""
    paths = [segment(cli.spool, n, event(n), event(n), b"{broken", event(1000 + n)) for n in numbers]
    copies = [copy(path, cli.spool.parent / path.name) for path in paths]
    cli("run", "--once", code=3)
    return copies


def test_merging_changes_no_sum_and_names_the_same_missing_segments(
    cli: Cli, one_connection: Connection
) -> None:
    load_segments(cli, 1, 2, 3, 5, 6, 9)
    before = [rows(one_connection, statement) for statement in (SUMS, CONSERVATION, MISSING)]
    assert merged(one_connection) == 6
    assert number(one_connection, LEDGER_ROWS) == 3  # 1-3, 5-6, 9
    assert [rows(one_connection, statement) for statement in (SUMS, CONSERVATION, MISSING)] == before
    assert [n for _, n in rows(one_connection, MISSING)] == [4, 7, 8]
    assert ledger.merge(one_connection) == 0
    load_segments(cli, 4, 7)
    assert merged(one_connection) == 2
    assert [n for _, n in rows(one_connection, MISSING)] == [8]
    assert json.loads(cli("status", "--json"))["database"]["chunks"] == 8


def test_a_segment_is_known_after_merging(cli: Cli, one_connection: Connection, tmp_path: Path) -> None:
    copies = load_segments(cli, 1, 2, 3)
    assert merged(one_connection) == 3
    before = rows(one_connection, CONSERVATION)
    assert "known 12" in cli("backfill", *copies)
    shutil.copy(copies[1], cli.spool / copies[1].name)
    assert "known 4" in cli("run", "--once")
    assert rows(one_connection, CONSERVATION) == before and number(one_connection, LEDGER_ROWS) == 1


def test_other_bytes_under_the_name_of_a_merged_segment_are_loaded(
    cli: Cli, one_connection: Connection
) -> None:
    load_segments(cli, 1, 2, 3)
    assert merged(one_connection) == 3
    segment(cli.spool, 2, event(2), event(77))
    assert "events 1, metrics 0, duplicates 1, rejected 0" in cli("run", "--once")


def test_a_merged_segment_under_another_name_or_loaded_again_adds_no_row_and_no_conserved_line(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    copies = load_segments(cli, 1, 2, 3)
    assert merged(one_connection) == 3
    before, events = rows(one_connection, CONSERVATION), number(one_connection, EVENTS)
    renamed = copy(copies[1], tmp_path / "renamed.ndjson")
    assert "events 0, metrics 0, duplicates 3, rejected 1" in cli("backfill", renamed, code=3)
    assert "events 0, metrics 0, duplicates 3, rejected 1" in cli("backfill", "--again", copies[1], code=3)
    assert merged(one_connection) == 0
    assert rows(one_connection, CONSERVATION) == before and number(one_connection, EVENTS) == events


def test_what_was_loaded_again_before_is_not_merged(cli: Cli, one_connection: Connection) -> None:
    copies = load_segments(cli, 1, 2, 3)
    cli("backfill", "--again", copies[1], code=3)
    before = rows(one_connection, CONSERVATION)
    assert merged(one_connection) == 2
    assert rows(one_connection, CONSERVATION) == before


def test_a_later_chunk_of_a_segment_that_is_merged_is_conserved(cli: Cli, one_connection: Connection) -> None:
    load_segments(cli, 1, 2)
    assert merged(one_connection) == 2
    one_connection.execute(
        b"INSERT INTO analytics_loads SELECT 'second', %s, 100, 10, 1, 1, 0, 0, 0, 'host', now()",
        [f"{STEM.format(2)}.ndjson"],
    )
    one_connection.commit()
    assert number(one_connection, "SELECT emitted FROM analytics_conservation") == 9


def test_what_a_writer_has_not_stated_or_has_in_the_spool_is_not_merged(
    cli: Cli, one_connection: Connection
) -> None:
    load_segments(cli, 1, 2, 3, 4)
    writer = STEM.partition("-")[2].removesuffix("-{:06d}")
    one_connection.execute(
        b"INSERT INTO analytics_writers SELECT %s, now(), 3, 12, 4, 0, ARRAY[2], ARRAY[4], false",
        [writer],
    )
    one_connection.commit()
    before = rows(one_connection, CONSERVATION)
    assert merged(one_connection) == 2
    kept = {n for (n,) in rows(one_connection, "SELECT segment FROM analytics_loads WHERE digests IS NULL")}
    assert kept == {2, 4}
    assert rows(one_connection, CONSERVATION) == before


def test_conservation_of_a_real_writer_holds_after_merging(cli: Cli, one_connection: Connection) -> None:
    cli("run", "--once")
    emitter = Emitter(cli.spool)
    for n in range(20):
        emit(emitter, n=n)
        emitter.seal()
    emitter.emit_event(event_type="seen", user_id="x")
    eventually(lambda: writers.statements(cli.spool))
    emitter.close()
    cli("run", "--once")
    before = rows(one_connection, CONSERVATION)
    assert merged(one_connection) > 1
    assert rows(one_connection, CONSERVATION) == before
    assert examined(cli)["conservation"]["verdict"] == "ok"


def test_the_daemons_role_may_merge_and_nobody_else(cli: Cli, one_connection: Connection) -> None:
    load_segments(cli, 1, 2, 3)
    one_connection.execute(AGE.encode())
    one_connection.commit()
    one_connection.execute("SET ROLE analytics_loader")
    assert rows(one_connection, "SELECT merged FROM analytics_merge_loads()") == [(3,)]
    one_connection.execute("RESET ROLE")
    may = "SELECT has_function_privilege('public', 'analytics_merge_loads(timestamptz)', 'EXECUTE')"
    assert rows(one_connection, may) == [(False,)]


def test_prune_merges_and_forgets_a_writer_whose_last_segment_is_old(
    cli: Cli, one_connection: Connection
) -> None:
    load_segments(cli, 1, 2, 3)
    one_connection.execute(AGE.encode())
    one_connection.commit()
    cli.owner()("prune", "--ledger", "90d")
    assert rows(one_connection, "SELECT segments FROM analytics_loads") == [(3,)]
    one_connection.execute("UPDATE analytics_loads SET loaded_at = loaded_at - interval '91 days'")
    one_connection.commit()
    cli.owner()("prune", "--ledger", "90d")
    assert number(one_connection, LEDGER_ROWS) == 0
    assert number(one_connection, "SELECT count(*) FROM analytics_events") == 6


@pytest.mark.long
def test_four_busy_workers_cost_at_most_5_mb_a_day(one_connection: Connection) -> None:
    """Segments of a second each: 345,600 ledger rows a day, 105 MB before."""
    sizes = [number(one_connection, SIZE)]
    for day in range(2):
        one_connection.execute(A_DAY.encode(), [day])
        one_connection.commit()
        unmerged = number(one_connection, SIZE)
        ledger.merge(one_connection)
        one_connection.commit()
        one_connection.autocommit = True
        one_connection.execute("VACUUM FULL analytics_loads")
        one_connection.autocommit = False
        sizes.append(number(one_connection, SIZE))
        print(
            f"day {day}: {(unmerged - sizes[-2]) / 1e6:.1f} MB before, {(sizes[-1] - sizes[-2]) / 1e6:.2f} after"
        )
    assert max(after - before for before, after in itertools.pairwise(sizes)) < 5e6
    assert number(one_connection, "SELECT sum(segments) FROM analytics_loads") == 2 * 4 * 86400
    assert number(one_connection, MISSING.replace("*", "count(*)").partition(" ORDER")[0]) == 0
    sample = orjson.dumps(rows(one_connection, "SELECT count(*), max(length(digests)) FROM analytics_loads"))
    print(sample.decode())
