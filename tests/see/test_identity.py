"""Events without a person or family count as events, but not as a person or family."""

from __future__ import annotations

import pytest

from loader.load.database import Connection
from loader.load.schema import apply_schema
from tests.see import data

ROWS = """
    INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata)
    SELECT gen_random_uuid(), 'memory_viewed', timestamp '2026-01-05' AT TIME ZONE 'UTC' + n * interval '5 hours',
        CASE WHEN n % 3 > 0 THEN md5((n % 3)::text)::uuid END,
        CASE WHEN n % 3 = 2 THEN md5('family')::uuid END, '{"memory_id": "a"}'
    FROM generate_series(0, 29) n
"""
RANGE = "'2026-01-05', '2026-01-12'"


@pytest.mark.parametrize("refreshed", [False, True], ids=["from rows", "from rollups"])
def test_questions_count_nobody_as_no_user_and_no_family(one_connection: Connection, refreshed: bool) -> None:
    apply_schema(one_connection, identity="optional")
    one_connection.execute(ROWS)
    one_connection.execute("INSERT INTO analytics_touched VALUES ('-infinity', 'events')")
    one_connection.commit()
    if refreshed:
        data.refresh(one_connection)

    def ask(query: str) -> object:
        return one_connection.execute(query.format(RANGE).encode()).fetchall()

    assert ask("SELECT sum(events), max(users), max(families) FROM analytics_trend({}, people => true)") == [
        (30, 2, 1)
    ]
    for who, count in (("user", 2), ("family", 1)):
        assert ask(f"SELECT max(dau), max(wau) FROM analytics_active({{}}, who => '{who}')") == [
            (count, count)
        ]
        assert ask(f"SELECT max(size) FROM analytics_retention({{}}, who => '{who}')") == [(count,)]
        assert ask(f"SELECT sum(new) FROM analytics_lifecycle({{}}, who => '{who}')") == [(count,)]
    assert ask(
        "SELECT count(DISTINCT user_id), bool_or(user_id IS NULL) FROM analytics_sessions_by_gap({})"
    ) == [(2, False)]
    assert ask("SELECT count(*), bool_or(user_id IS NULL) FROM analytics_interactions({})") == [(2, False)]
    assert ask("SELECT count(*) FROM analytics_features('2026-01-12')") == [(2,)]
