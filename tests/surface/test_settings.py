"""Settings: what is invalid is refused where an emitter is made, and never inside a request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spool import Emitter, Settings
from tests.processes import environment, shown

INVALID = {
    "SPOOL_MAX_AGE": ["soon", "0", "-1", "nan", "inf", "1e9"],
    "SPOOL_SEGMENT_BYTES": ["many", "4MB", "1.5", "100", "1e400", str(1 << 62)],
    "SPOOL_MAX_LINE_BYTES": ["0", str(8 << 20)],
    "SPOOL_MAX_SPOOL_BYTES": ["-1", "100", str((8 << 20) - 1)],
    "SPOOL_FSYNC": ["maybe"],
    "SPOOL_REQUEST_TIMER_RATE": ["half", "10%", "0", "-0.1", "1.01", "nan", "inf"],
    "SPOOL_STRICT": ["2"],
    "SPOOL_REDACT": [",", "+", " + , "],
}


@pytest.mark.parametrize(
    ("variable", "value"), [(name, value) for name, all_ in INVALID.items() for value in all_]
)
def test_an_invalid_variable_is_named_where_an_emitter_is_made(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"^{variable} must be "):
        Emitter()


@pytest.mark.parametrize(
    "given",
    [
        {"max_age": "soon"}, {"max_age": True}, {"segment_bytes": 8192.5}, {"max_spool_bytes": 5000},
        {"max_line_bytes": 60000, "segment_bytes": 8192, "max_spool_bytes": 65536}, {"redact": "password"},
        {"directory": "a\0b"}, {"request_timer_rate": 0}, {"request_timer_rate": True},
        {"request_timer_rate": "0.5"},
    ],
    ids=shown,
)  # fmt: skip
def test_an_invalid_argument_is_named_where_an_emitter_is_made(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))} must be "):
        Emitter(**given)


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_counts_as_unset(empty: str) -> None:
    names = ["DIR", *(name.upper() for name in vars(Settings()))]
    assert Settings.of({f"SPOOL_{name}": empty for name in names}) == Settings.of({})


APPLICATION = """
import asyncio, logging, os, sys, uuid
os.environ[sys.argv[1]] = sys.argv[2]
logging.basicConfig(format="%(message)s")
from spool import get_analytics_service, get_emitter
from spool.asgi import AnalyticsMiddleware
from spool.events import emits, log_feed_viewed
from spool.metrics import log_feed_interaction
from spool.testing import record
from spool.wsgi import AnalyticsMiddleware as Wsgi

user = uuid.uuid4()

@emits("feed_viewed", user_id="user", family_unit_id="user")
def view(user):
    return 42

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})

async def send(message):
    sent.append(message)

sent = []
assert view(user) == 42
assert log_feed_viewed.emit(user_id=user, family_unit_id=user) is None
assert asyncio.run(log_feed_interaction(interaction_type="like", user_id=user, family_unit_id=user)) is None
asyncio.run(get_analytics_service().record_gauge(metric_name="hits", value=1))
scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
asyncio.run(AnalyticsMiddleware(app)(scope, None, send))
assert len(sent) == 2
asyncio.run(AnalyticsMiddleware(app)({"type": "lifespan"}, None, send))
assert len(sent) == 4
get_emitter().prepare()
if (child := os.fork()) == 0:
    get_emitter().prepare()
    os._exit(get_emitter().emit_event(event_type="feed_viewed") is not None)
assert os.waitpid(child, 0)[1] == 0
with get_emitter().timer("work_ms"):
    wsgi = Wsgi(lambda environ, start: start("200 OK", []) or [b"body"])
    assert list(wsgi({}, lambda *_: None)) == [b"body"]
assert get_emitter().seal()
assert get_emitter().stats().dropped == {"settings": 10}, get_emitter().stats()
try:
    record().__enter__()
except ValueError as error:
    assert sys.argv[1] in str(error)
else:
    raise AssertionError("a test that records learns of the setting")
get_emitter().close()
"""


@pytest.mark.parametrize("value", ["soon", "-1"])
def test_a_bad_variable_never_raises_inside_a_request_but_warns_once_and_counts(
    tmp_path: Path, value: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", APPLICATION, "SPOOL_MAX_AGE", value],
        env=environment(SPOOL_DIR=str(tmp_path / "spool")), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (warning,) = done.stderr.splitlines()
    assert "SPOOL_MAX_AGE must be" in warning and "correct it" in warning
    assert not (tmp_path / "spool").exists()


def test_a_relative_directory_in_a_removed_one_is_an_invalid_setting(tmp_path: Path) -> None:
    code = (
        "import os, sys; from spool import get_emitter as get; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])"
    )
    code += "; get().increment_counter(metric_name='hits'); assert get().stats().dropped == {'settings': 1}"
    (tmp_path / "gone").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "gone")]
    subprocess.run(command, env=environment(SPOOL_DIR="spool"), check=True, timeout=60)


def test_the_longest_line_that_may_be_set_is_one_that_the_loader_reads() -> None:
    from loader.files.limits import CHUNK_BYTES
    from spool.record import MAX_LINE_BYTES

    assert MAX_LINE_BYTES <= CHUNK_BYTES
