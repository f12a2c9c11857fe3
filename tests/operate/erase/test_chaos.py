"""A person is erased while three people emit and the loader runs, is killed and starts again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loader.load.database import Connection
from tests.load.lines import number, rows, segment
from tests.operate.erase import story
from tests.operate.erase.story import ANNA, BERT, CARL, HOME, facts
from tests.processes import Cli, eventually

EMIT = """
import sys, itertools
from spool import Emitter
who, other, family, directory = sys.argv[1:]
emitter = Emitter(directory)
print("ready", flush=True)
for n in itertools.count():
    emitter.emit_event(event_type="seen", user_id=who, family_unit_id=family, metadata={"n": n, "friend": other})
    emitter.increment_counter(metric_name="hits", labels={"friend": other.upper()})
    if n % 200 == 0 and sys.stdin.readline() == "":
        break
emitter.close()
print(n + 1, flush=True)
"""


def emitting(spool: Path, who: object, other: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", EMIT, str(who), str(other), str(HOME), str(spool)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.long
def test_a_person_is_erased_while_everybody_goes_on(
    cli: Cli, one_connection: Connection, tmp_path: Path
) -> None:
    archive = tmp_path / "archive"
    pairs = ((ANNA, BERT), (BERT, ANNA), (CARL, BERT))
    emitters = [emitting(cli.spool, who, other) for who, other in pairs]

    def let_emit(rounds: int) -> None:
        for _ in range(rounds):
            for process in emitters:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()

    segment(cli.spool, 1, story.of(ANNA, 1)[:-1], story.of(BERT, 2, metadata={"a": ANNA.hex})[:-1])
    with cli.daemon("--archive", str(archive)) as loader:
        let_emit(10)
        eventually(lambda: number(one_connection, "SELECT count(*) FROM analytics_events") > 2000)
        let_emit(3)
        loader.kill()
    with cli.daemon("--archive", str(archive)):
        let_emit(3)
        facts(cli, "--user", str(ANNA), "--archive", archive, code=None)
        let_emit(10)
        emitted = [int(process.communicate()[0]) for process in emitters]
        statement = f"SELECT count(*) FROM analytics_events WHERE user_id = '{CARL}'"
        eventually(lambda: number(one_connection, statement) == emitted[2])
        eventually(lambda: not list(cli.spool.glob("*.open")) and not list(cli.spool.glob("2*.ndjson")))
        eventually(lambda: story.found_in_files(ANNA, cli.spool, archive) == [])
    facts(cli, "--user", str(ANNA), "--archive", archive, "--verify")
    cli("backfill", "--again", archive, code=None)
    cli("run", "--once", "--archive", archive, code=None)
    assert story.found_in_tables(one_connection, ANNA) == []
    assert story.found_in_files(ANNA, cli.spool, archive) == []
    counts = dict(rows(one_connection, "SELECT user_id, count(*) FROM analytics_events GROUP BY 1"))
    assert counts == {BERT: emitted[1], CARL: emitted[2]}
    friends = dict(
        rows(
            one_connection,
            "SELECT lower(labels->>'friend'), count(*) FROM analytics_metrics WHERE metric_name = 'hits' GROUP BY 1",
        )
    )
    assert friends == {str(BERT): emitted[0] + emitted[2], "00000000-0000-0000-0000-000000000000": emitted[1]}
    story.balanced(one_connection)
