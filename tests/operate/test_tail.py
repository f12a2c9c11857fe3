"""`loader tail` shows the lines in the spool, and with -f new lines, each once."""

from __future__ import annotations

import subprocess
import uuid
from contextlib import closing
from pathlib import Path

import orjson
import pytest

from spool import Emitter
from spool.context import bind
from tests.processes import LOADER, environment, eventually

USERS = [str(uuid.UUID(int=number)) for number in (1, 2)]


def emit(emitter: Emitter, number: int, name: str = "made") -> None:
    user = USERS[number % 2]
    with bind(user_id=user, family_unit_id=user):
        emitter.emit_event(event_type=name, metadata={"number": number})


def tail(spool: Path, *options: str) -> list[int]:
    ended = subprocess.run(
        [*LOADER, "tail", "--spool-dir", spool, *options], env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return [orjson.loads(line)["metadata"]["number"] for line in ended.stdout.splitlines()]


def test_the_last_lines_come_from_sealed_and_open_segments(tmp_path: Path) -> None:
    with closing(Emitter(tmp_path, max_age=3600)) as emitter:
        for number in range(8):
            emit(emitter, number, "made" if number < 6 else "other")
            if number == 3:
                emitter.seal()
        assert len(list(tmp_path.glob("*.open"))) >= 1
        assert tail(tmp_path) == list(range(8))
        assert tail(tmp_path, "-n", "3") == [5, 6, 7]
        assert tail(tmp_path, "-n", "0") == []
        assert tail(tmp_path, "--type", "other") == [6, 7]
        assert tail(tmp_path, "--user", USERS[1].upper(), "-n", "2") == [5, 7]
        assert tail(tmp_path, "--type", "made", "--user", USERS[0]) == [0, 2, 4]


def test_what_is_emitted_is_followed_through_sealing_and_loading(tmp_path: Path) -> None:
    spool, shown = tmp_path / "spool", tmp_path / "shown"
    with closing(Emitter(spool, max_age=3600)) as emitter, shown.open("wb") as output:
        emit(emitter, 0)
        command = [*LOADER, "tail", "-f", "--spool-dir", str(spool)]
        following = subprocess.Popen(command, stdout=output, env=environment())
        try:
            for number in range(1, 4):
                eventually(lambda: len(shown.read_bytes().splitlines()) == number)  # noqa: B023, it runs immediately
                emit(emitter, number)
                if number == 2:
                    emitter.seal()
            eventually(lambda: len(shown.read_bytes().splitlines()) == 4)
            emitter.seal()
            for file in spool.glob("*.ndjson"):
                file.unlink()
            emit(emitter, 4)
            eventually(lambda: len(shown.read_bytes().splitlines()) == 5)
        finally:
            following.terminate()
            assert following.wait(timeout=60) == 0
    numbers = [orjson.loads(line)["metadata"]["number"] for line in shown.read_bytes().splitlines()]
    assert numbers == list(range(5))


@pytest.mark.parametrize("content", [b"", b'{"a":1', b"\0" * 5000, b'{"a":\0\0}\n'])
def test_a_line_that_is_not_complete_is_not_shown(tmp_path: Path, content: bytes) -> None:
    with closing(Emitter(tmp_path)) as emitter:
        emit(emitter, 1)
    (sealed,) = tmp_path.glob("*.ndjson")
    with sealed.open("ab") as file:
        file.write(content)
    assert tail(tmp_path) == [1]


def test_a_user_that_is_no_uuid_is_an_error(tmp_path: Path) -> None:
    command = [*LOADER, "tail", "--spool-dir", str(tmp_path), "--user", "anna"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 2 and "must be a UUID" in ended.stderr
