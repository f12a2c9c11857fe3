"""Identity: the application's own keys as UUIDs, and events without a person or a family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.load.batch import load
from loader.load.counts import Counts
from loader.load.database import Connection
from spool import Emitter, analytics_uuid
from spool.context import bind
from tests.emit.lines import lines
from tests.load.lines import ID, as_owner, chunk, event, metric, number, rejected, rows, segment
from tests.operate.test_doctor import examined
from tests.processes import Cli

NULLABLE = (
    "SELECT attname FROM pg_attribute WHERE attrelid = 'analytics_events'::regclass AND NOT attnotnull "
    "AND attname IN ('user_id', 'family_unit_id') ORDER BY 1"
)
OPTIONAL = (
    "ALTER TABLE analytics_events ALTER user_id DROP NOT NULL, ALTER family_unit_id DROP NOT NULL; "
    "INSERT INTO analytics_settings VALUES ('identity', 'optional')"
)
WAYS = pytest.mark.parametrize("duplicates", [0.0, 0.1, 1.0], ids=["direct", "deduplicating", "comparing"])
ANONYMOUS = {"user_id": None, "family_unit_id": None}


# ---- keys of the application ------------------------------------------------------------------------


def test_the_mapping_never_changes() -> None:
    assert str(analytics_uuid("user", 42)) == "ea3fd43b-e1e5-8d62-a163-dae19fc740bd"
    assert analytics_uuid("user", "42") == analytics_uuid("user", 42) != analytics_uuid("family", 42)
    assert analytics_uuid("user", None) is None


@pytest.mark.parametrize("key", [True, 1.5, b"1", object()])
def test_a_key_of_another_type_is_an_error(key: object) -> None:
    with pytest.raises(TypeError, match="must be an integer or a text"):
        analytics_uuid("user", key)  # type: ignore[call-overload]  # also refused by type checkers


@pytest.mark.parametrize(
    ("kind", "key"), [("User", 1), ("a:b", 1), ("", 1), ("user", "\0"), ("user", "\ud800")]
)
def test_what_postgres_could_not_map_the_same_way_is_an_error(kind: str, key: str | int) -> None:
    with pytest.raises(ValueError):
        analytics_uuid(kind, key)


def test_postgres_computes_the_same(connection: Connection) -> None:
    @given(st.integers() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
    def agree(key: int | str) -> None:
        ((found, version),) = connection.execute(
            "SELECT analytics_uuid(%s, %s), analytics_uuid('user', NULL) IS NULL", ["user", str(key)]
        ).fetchall()
        assert (found, version) == (analytics_uuid("user", key), True)

    agree()


def test_events_join_with_the_applications_own_keys(cli: Cli, one_connection: Connection) -> None:
    emitter = Emitter(cli.spool)
    emitter.emit_event(
        event_type="paid", user_id=analytics_uuid("user", 7), family_unit_id=analytics_uuid("family", "smith")
    )
    emitter.close()
    cli("run", "--once")
    joined = (
        "WITH customer (id, name) AS (VALUES (7, 'smith'), (8, 'jones')) SELECT customer.id, name FROM analytics_events "
        "JOIN customer ON user_id = analytics_uuid('user', customer.id::text) AND family_unit_id = analytics_uuid('family', name)"
    )
    assert rows(one_connection, joined) == [(7, "smith")]


# ---- without a person or a family ---------------------------------------------------------------------


def test_an_emitter_writes_null_only_if_it_is_set_so(tmp_path: Path) -> None:
    settings: tuple[tuple[Literal["required", "optional"], int], ...] = (("required", 1), ("optional", 5))
    for setting, emitted in settings:
        emitter = Emitter(tmp_path / setting, identity=setting)
        emitter.emit_event(event_type="seen")
        emitter.emit_event(event_type="seen", user_id=ID)
        emitter.emit_event(event_type="seen", family_unit_id=ID, session_id=ID)
        with bind(user_id=ID, role="guest"):
            emitter.emit_event(event_type="seen", metadata={"n": 1})
        emitter.emit_event(event_type="seen", user_id=ID, family_unit_id=ID)
        emitter.emit_event(event_type="seen", user_id="", family_unit_id=0)
        stats = emitter.stats()
        emitter.close()
        assert stats.emitted == emitted
        assert (
            stats.dropped == {"missing": 4, "invalid_uuid": 1}
            if setting == "required"
            else {"invalid_uuid": 1}
        )
    events = [line for line in lines(tmp_path / "optional") if "event_type" in line]
    found = [(line["user_id"], line["family_unit_id"], line["session_id"]) for line in events]
    assert found == [(None, None, None), (ID, None, None), (None, ID, ID), (ID, None, None), (ID, ID, None)]
    assert events[3]["metadata"] == {"role": "guest", "n": 1}


def test_the_setting_is_read_from_the_environment(cli: Cli) -> None:
    from spool import Settings

    assert Settings.of({"SPOOL_IDENTITY": " Optional "}).identity == "optional"
    assert Settings.of({"SPOOL_IDENTITY": ""}).identity == "required"
    with pytest.raises(ValueError, match=r"SPOOL_IDENTITY must be required or optional, not 'maybe'"):
        Settings.of({"SPOOL_IDENTITY": "maybe"})


@WAYS
def test_events_without_an_identity_are_loaded_once(
    connection: Connection, tmp_path: Path, duplicates: float
) -> None:
    as_owner(connection, OPTIONAL)
    lines = [
        event(1, **ANONYMOUS),
        event(2, user_id=None),
        event(3, family_unit_id=None),
        event(4),
        metric(1),
    ]
    load(connection, [chunk(*lines, file="before")], tmp_path)
    again = [*lines, event(5, **ANONYMOUS), event(5, **ANONYMOUS)]
    assert load(connection, [chunk(*again)], tmp_path, duplicates).counts == Counts(events=1, duplicates=6)
    found = "SELECT count(*) FILTER (WHERE user_id IS NULL), count(*) FILTER (WHERE family_unit_id IS NULL) FROM analytics_events"
    assert rows(connection, found) == [(3, 3)]


@WAYS
@pytest.mark.parametrize(
    ("stored", "other"), [({}, ANONYMOUS), (ANONYMOUS, {}), ({"user_id": None}, ANONYMOUS)]
)
def test_somebody_and_nobody_are_a_collision(
    connection: Connection, tmp_path: Path, duplicates: float, stored: dict[str, None], other: dict[str, None]
) -> None:
    as_owner(connection, OPTIONAL)
    load(connection, [chunk(event(1, **stored), file="before")], tmp_path)
    counts = load(connection, [chunk(event(1, **other))], tmp_path, duplicates).counts
    assert counts == Counts(rejected=1)
    assert [code for _, _, code in rejected(tmp_path)] == ["collision"]


TRIGGER = (
    "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN new; END'; "
    "CREATE TRIGGER keep BEFORE INSERT ON analytics_events FOR EACH ROW EXECUTE FUNCTION keep()"
)


@pytest.mark.parametrize("prepared", ["SELECT 1", TRIGGER], ids=["together", "row by row"])
@WAYS
def test_a_null_that_the_tables_refuse_is_a_reject_that_names_the_command(
    connection: Connection, tmp_path: Path, duplicates: float, prepared: str
) -> None:
    as_owner(connection, prepared)
    lines = [event(1), event(2, **ANONYMOUS), event(3, family_unit_id=None), metric(1), event(4)]
    counts = load(connection, [chunk(*lines)], tmp_path, duplicates).counts
    assert counts == Counts(events=2, metrics=1, rejected=2)
    from loader.files import rejects

    (path,) = rejects.files(tmp_path)
    found = list(rejects.read(path))
    assert [each.line for each in found] == [2, 3]
    assert {each.code for each in found} == {"postgres_23502"}
    assert all("loader init --optional-identity" in each.reason for each in found)
    assert 'column "family_unit_id"' in found[1].reason


def test_a_field_that_is_missing_is_not_a_null(connection: Connection, tmp_path: Path) -> None:
    as_owner(connection, OPTIONAL)
    line = event(1).replace(b'"user_id":', b'"session_id":', 1)
    assert load(connection, [chunk(line)], tmp_path).counts.rejected == 1
    assert [code for _, _, code in rejected(tmp_path)] == ["missing_field"]


def test_rejects_load_once_identity_is_optional(cli: Cli, one_connection: Connection) -> None:
    emitter = Emitter(cli.spool, identity="optional")
    emitter.emit_event(event_type="seen")
    emitter.close()
    cli("run", "--once", code=3)
    assert "loader init --optional-identity" in cli("rejects", "show")
    assert "Identity: optional" in cli.owner()("init", "--optional-identity")
    assert "events 1" in cli("rejects", "retry")
    assert number(one_connection, "SELECT count(*) FROM analytics_events WHERE user_id IS NULL") == 1


def test_the_choice_is_remembered_printed_and_examined(cli: Cli, one_connection: Connection) -> None:
    owner = cli.owner()
    assert "Identity: required" in owner("init") and rows(one_connection, NULLABLE) == []
    assert "required" in examined(cli)["identity"]["finding"]
    assert "Identity: optional" in owner("init", "--optional-identity")
    both = [("family_unit_id",), ("user_id",)]
    assert rows(one_connection, NULLABLE) == both
    assert (
        json.loads(owner("init", "--json"))["identity"] == "optional"
        and rows(one_connection, NULLABLE) == both
    )
    assert "optional" in examined(cli)["identity"]["finding"]
    one_connection.execute("ALTER TABLE analytics_events ALTER user_id SET NOT NULL")
    one_connection.commit()
    finding = examined(cli)["identity"]
    assert finding["verdict"] == "warning" and "`loader init --optional-identity`" in finding["remedy"]
    assert "Identity: optional" in owner("init") and rows(one_connection, NULLABLE) == both
    assert (
        "Identity: required" in owner("init", "--required-identity") and rows(one_connection, NULLABLE) == []
    )


def test_identity_is_not_required_over_rows_without_one(cli: Cli, one_connection: Connection) -> None:
    cli.owner()("init", "--optional-identity")
    segment(cli.spool, 1, event(1, **ANONYMOUS))
    cli("run", "--once")
    assert "nothing was changed: delete them" in cli.owner()("init", "--required-identity", code=1)
    assert "Identity: optional" in cli.owner()("init")


def test_tables_that_already_accept_nobody_keep_it(cli: Cli, one_connection: Connection) -> None:
    one_connection.execute("DROP TABLE analytics_settings, analytics_schema CASCADE")
    one_connection.execute(OPTIONAL.partition(";")[0].encode())
    one_connection.commit()
    assert "Identity: optional" in cli.owner()("init")
