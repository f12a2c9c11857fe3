"""`loader ask`: output at 80 columns and in a pipe, JSON and CSV, and one clear line for an invalid question."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import struct
import subprocess
import termios
from datetime import UTC, datetime, timedelta
from fcntl import ioctl
from zoneinfo import ZoneInfo

import pytest
from psycopg.conninfo import make_conninfo

from loader.errors import UsageError
from loader.see import figures
from loader.see.period import instant, midnight, period
from loader.see.questions import COLUMNS, STATEMENTS
from tests.processes import HANGS_AFTER, LOADER, environment
from tests.see.answers.conftest import HOSTILE, READER, Reader, World

USER = "SELECT user_id FROM analytics_events WHERE event_type = 'memory_posted' ORDER BY event_id LIMIT 1"
QUESTIONS = {
    "trend": ["trend", "--top", "3"],
    "active": ["active", "--since", "10d"],
    "lifecycle": ["lifecycle", "--who", "family"],
    "retention": ["retention", "--starting", "user_registered", "--periods", "12"],
    "funnel": ["funnel", "feed_viewed", "memory_viewed", "reaction_created", "--within", "1d"],
    "funnel by": ["funnel", "memory_viewed", "reaction_created", "--breakdown", "source"],
    "sessions": ["sessions", "--since", "7d"],
    "sessions by gap": ["sessions", "--gap", "30m", "--bucket", "week"],
    "requests": ["requests"],
    "anomalies": ["anomalies"],
    "interactions": ["interactions", "--limit", "3"],
    "user": ["user", "UUID"],
}
SOME_QUESTIONS = [
    name if name in ("trend", "funnel", "user") else pytest.param(name, marks=pytest.mark.long)
    for name in QUESTIONS
]
"""In the default run, three whose tables differ most."""


def arguments(world: World, name: str) -> list[str]:
    ((user,),) = world.connection.execute(USER).fetchall()
    return ["ask", *(str(user) if word == "UUID" else word for word in QUESTIONS[name])]


def on_a_terminal(world: World, *words: str, columns: int = 80) -> str:
    """Return the output on a terminal of that width."""
    primary, secondary = pty.openpty()
    ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    variables = environment(LOADER_DSN=make_conninfo(world.dsn, user=READER), TERM="xterm-256color")
    variables.pop("COLUMNS", None)
    with subprocess.Popen([*LOADER, *words], env=variables, stdout=secondary, stderr=secondary) as process:
        os.close(secondary)
        printed = b""
        while True:
            try:
                block = os.read(primary, 65536)
            except OSError:  # the last writer closed it
                break
            printed += block
    os.close(primary)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


@pytest.mark.parametrize("name", SOME_QUESTIONS)
def test_every_line_fits_into_80_columns_and_no_number_is_cut(world: World, name: str) -> None:
    printed = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal(world, *arguments(world, name)))
    assert all(len(line) <= 80 for line in printed.split("\r\n")), printed
    assert "…" not in printed and "\x1b" not in printed


@pytest.mark.parametrize("name", SOME_QUESTIONS)
def test_a_pipe_gets_plain_text_without_colours_and_trailing_blanks(
    reader: Reader, world: World, name: str
) -> None:
    printed = reader(*arguments(world, name)).out
    assert "\x1b" not in printed and printed.count("\n") > 3
    assert all(line == line.rstrip() for line in printed.splitlines())


def test_bars_and_sparklines_are_ascii_if_the_output_is(reader: Reader) -> None:
    printed = reader("ask", "active", "--since", "5d", PYTHONIOENCODING="ascii").out
    assert printed.isascii() and "####" in printed


@pytest.mark.parametrize("name", QUESTIONS)
def test_json_and_csv_have_the_same_rows(reader: Reader, world: World, name: str) -> None:
    words = [*arguments(world, name), "--until", datetime.now(UTC).isoformat(), "--tz", "America/New_York"]
    found = json.loads(reader.inside(*words, "--json").out)
    header, *rows = csv.reader(io.StringIO(reader.inside(*words, "--csv").out))
    assert found["question"] in COLUMNS and found["tz"] == "America/New_York"
    assert [list(row) for row in found["rows"]] == [header] * len(rows)
    for row, cells in zip(found["rows"], rows, strict=True):
        for value, cell in zip(row.values(), cells, strict=True):
            same = (
                "" if value is None else json.dumps(value) if isinstance(value, bool | dict) else str(value)
            )
            assert cell == same


def test_the_numbers_are_those_of_the_function(reader: Reader, world: World) -> None:
    until = datetime.now(UTC).isoformat()
    found = json.loads(reader("ask", "active", "--until", until, "--tz", "Asia/Kolkata", "--json").out)
    first = datetime.fromisoformat(found["since"])
    assert (first.hour, first.utcoffset()) == (0, timedelta(hours=5, minutes=30))
    statement = "SELECT day::text, dau, wau, mau FROM analytics_active(%s, %s, 'Asia/Kolkata') ORDER BY 1"
    expected = world.connection.execute(statement, [first, until]).fetchall()
    assert [(row["day"], row["dau"], row["wau"], row["mau"]) for row in found["rows"]] == expected
    assert sum(row["dau"] for row in found["rows"]) > 100


def test_requests_by_bucket_are_for_machines(reader: Reader) -> None:
    rows = json.loads(reader("ask", "requests", "--since", "2d", "--bucket", "day", "--json").out)["rows"]
    assert {"starts", "endpoint", "p95", "complete"} <= set(rows[0])


def test_a_timeline_shows_what_one_user_did_in_order(reader: Reader, world: World) -> None:
    words = arguments(world, "user")
    rows = json.loads(reader(*words, "--json", "--limit", "5").out)["rows"]
    times = [row["timestamp"] for row in rows]
    assert times == sorted(times) and len(times) == 5
    statement = "SELECT max(timestamp) = %s FROM analytics_events WHERE user_id = %s"
    assert world.number(f"SELECT ({statement})::int", times[-1], words[2]) == 1


def test_a_name_that_is_an_attack_is_shown_and_not_obeyed(reader: Reader, world: World) -> None:
    escape = "\x1b[31m\x07"
    world.connection.execute(
        "INSERT INTO analytics_events (event_id, event_type, timestamp, user_id, family_unit_id, metadata) "
        "VALUES (gen_random_uuid(), 'odd', now() - interval '400 days', md5('y')::uuid, md5('y')::uuid, %s)",
        [json.dumps({"note": escape})],
    )
    ((user,),) = world.connection.execute("SELECT md5('y')::uuid").fetchall()
    assert "\x1b[31m" not in on_a_terminal(world, "ask", "user", str(user), "--since", "2020-01-01")
    assert HOSTILE in reader("ask", "trend").out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trend", "--since", "2026-13-01"], '--since "2026-13-01" is not a point in time'),
        (["trend", "--since", "tomorrow"], "is not a point in time"),
        (["trend", "--since", "9999999d"], "is not a point in time"),
        (["trend", "--since", "1d", "--until", "2d"], "is not before --until"),
        (["trend", "--tz", "Mars/Base"], '"Mars/Base" is not a time zone'),
        (["trend", "--tz", "America"], "is not a time zone"),
        (["trend", "--tz", "../../etc/passwd"], "is not a time zone"),
        (["trend", "--bucket", "fortnight"], "fortnight"),
        (["trend", "--bucket", "hour", "--since", "2020-01-01"], "more than 5000 hours"),
        (["trend", "--json", "--csv"], "are mutually exclusive"),
        (["trend", "--nothing"], "No such option"),
        (["funnel"], "Missing argument"),
        (["funnel", "a", "--within", "soon"], '--within "soon" is not a duration'),
        (["funnel", *"abcdefghijklm"], "at most 12 steps, not 13"),
        (["user", "somebody"], "not a valid UUID"),
        (["sessions", "--gap", "0m"], "is not a duration"),
        (["retention", "--periods", "0"], "--periods"),
        (["nothing"], "No such command"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_exit_code_2(
    reader: Reader, words: list[str], part: str
) -> None:
    ended = reader.inside("ask", *words)
    assert ended.code == 2 and part in ended.err and ended.err.count("\n") == 1 and ended.out == ""


def test_an_event_type_that_no_event_has_is_named_with_what_was_probably_meant(reader: Reader) -> None:
    ended = reader("ask", "funnel", "feed_viewd", "memory_viewed")
    assert 'no event has the type "feed_viewd": did you mean "feed_viewed"?' in ended.err


def test_a_database_of_an_earlier_version_is_named_with_what_to_do(one_server: str) -> None:
    variables = environment(LOADER_DSN=make_conninfo(one_server, dbname="template1"))
    ended = subprocess.run([*LOADER, "ask", "trend"], env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and "run `loader init`" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["ask", "active"], ["ask", "requests"], ["report", "--json"]])
def test_the_role_of_the_loader_may_ask_too(world: World, words: list[str]) -> None:
    variables = environment(LOADER_DSN=make_conninfo(world.dsn, user="analytics_loader"))
    ended = subprocess.run([*LOADER, *words], env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_nothing_is_written_by_a_question(world: World) -> None:
    from loader.see.questions import reading

    with reading(world.dsn) as connection, pytest.raises(Exception, match="read-only transaction"):
        connection.execute("DELETE FROM public.analytics_events")


def test_every_statement_has_its_columns() -> None:
    assert STATEMENTS.keys() == COLUMNS.keys()


# ---- time ----

NOW = datetime(2026, 11, 1, 18, 30, tzinfo=UTC)  # the day on which New York's clocks go back


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-01", "2026-11-01T04:00:00+00:00"),
        ("2026-11-02", "2026-11-02T05:00:00+00:00"),
        ("today", "2026-11-01T04:00:00+00:00"),
        ("yesterday", "2026-10-31T04:00:00+00:00"),
        ("1d", "2026-10-31T04:00:00+00:00"),
        ("1w", "2026-10-25T04:00:00+00:00"),
        ("24h", "2026-10-31T18:30:00+00:00"),
        ("90m", "2026-11-01T17:00:00+00:00"),
        ("2026-11-01T08:00", "2026-11-01T13:00:00+00:00"),
        ("2026-11-01T08:00Z", "2026-11-01T08:00:00+00:00"),
        ("2026-11-01T08:00+05:30", "2026-11-01T02:30:00+00:00"),
        ("now", "2026-11-01T18:30:00+00:00"),
    ],
)
def test_a_date_is_local_midnight_and_an_age_in_hours_is_exact(text: str, expected: str) -> None:
    assert instant(text, ZoneInfo("America/New_York"), NOW, "--since").isoformat() == expected


@pytest.mark.parametrize(
    ("zone", "day", "expected"),
    [
        ("America/Sao_Paulo", datetime(2018, 11, 4), "2018-11-04T03:00:00+00:00"),  # 00:00 does not exist
        ("America/Havana", datetime(2026, 11, 1), "2026-11-01T04:00:00+00:00"),  # 00:00 comes twice
        (
            "Pacific/Apia",
            datetime(2011, 12, 31),
            "2011-12-30T10:00:00+00:00",
        ),  # the day before does not exist
        ("Australia/Lord_Howe", datetime(2026, 4, 5), "2026-04-04T13:00:00+00:00"),
    ],
)
def test_midnight_if_clocks_skip_or_repeat_it(zone: str, day: datetime, expected: str) -> None:
    assert midnight(day.date(), ZoneInfo(zone)).astimezone(UTC).isoformat() == expected


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(UsageError, match="is not before"):
        period("2026-11-01", "2026-11-01", "UTC")


# ---- figures ----


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0%"), (0.001, "<1%"), (0.5, "50%"), (0.999, ">99%"), (1, "100%"), (None, "-")]
)
def test_a_share_is_never_rounded_to_all_or_nothing(value: float | None, shown: str) -> None:
    assert figures.share(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.62, "0.6 s"),
        (31, "31 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (7200, "2.0 h"),
        (400000, "5 d"),
    ],
)
def test_a_length_of_time_is_in_its_largest_sensible_unit(seconds: float, shown: str) -> None:
    assert figures.duration(timedelta(seconds=seconds)) == shown


def test_a_sparkline_is_never_wider_than_asked() -> None:
    for number in (0, 1, 5, 36, 37, 500):
        assert len(figures.spark([1.0] * number, 36)) <= 36


@pytest.mark.parametrize("form", [[], ["--csv"], ["--json"]])
def test_a_reader_that_has_enough_is_no_error(world: World, form: list[str]) -> None:
    """Such as `loader ask ... | head`, with an answer shorter or longer than a buffer."""
    for bucket in ("day", "hour"):
        command = [*LOADER, "ask", "trend", "--bucket", bucket, *form]
        asking = subprocess.Popen(
            command, env=environment(LOADER_DSN=world.dsn), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert asking.stdout is not None
        asking.stdout.close()
        _, errors = asking.communicate(timeout=HANGS_AFTER)
        assert (errors, asking.returncode) == (b"", 1)
