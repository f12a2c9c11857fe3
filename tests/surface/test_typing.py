"""Type checkers find invalid calls, and editors complete valid ones: mypy and pyright on the same samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

IMPORTS = """
import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Literal, Unpack
from uuid import UUID, uuid4

from fastapi import BackgroundTasks

from spool import AnalyticsService, Emitter, get_analytics_service, get_emitter
from spool.context import bind
from spool.events import Who, emits, event, log_memory_posted, log_user_logged_out
from spool.metrics import log_feed_interaction
"""

GOOD = '''
user = uuid4()
emitter = Emitter("/tmp/spool", max_age=1, redact=["hobby"], strict=True)
analytics: AnalyticsService = get_analytics_service()
log_memory_posted(memory_id=user, media_type="photo", user_id=user, timestamp=datetime.now(UTC))
event_id: str | None = log_memory_posted.emit(memory_id=str(user))
log_user_logged_out()


@event
def log_album_shared(
    *, album_id: UUID | str, audience: Literal["family", "public"], size: float | None = None,
    **who: Unpack[Who],
) -> None:
    """An album was shared."""


log_album_shared(album_id=user, audience="family", size=3, user_id="12", family_unit_id=7)
log_plain = event("plain", "Has no static types.", album_id=UUID, note=str | None)
log_plain(album_id=user)


@emits("album_shared", album_id="result", audience=lambda arguments, result: "family")
def share() -> UUID:
    return user


@emits(log_album_shared, album_id="result", audience="audience")
async def share_later(audience: str) -> UUID:
    return user


def scrub(event: dict[str, object]) -> dict[str, object] | None:
    return event


emitter.before_emit = scrub
get_emitter().increment_counter(metric_name="hits", value=Decimal(1), labels={"a": 1})
emitter.record_metric(metric_name="hits", metric_type="counter", value=1.5)
emitter.record_gauge(metric_name="share", value=Fraction(1, 2))


async def view(tasks: BackgroundTasks) -> str | None:
    analytics.increment_counter(metric_name="hits")
    tasks.add_task(log_memory_posted, memory_id=user)
    tasks.add_task(analytics.emit_event, event_type="seen")
    task = asyncio.create_task(log_memory_posted(memory_id=user))
    await asyncio.gather(log_memory_posted(memory_id=user), analytics.record_gauge(metric_name="a", value=1))
    await log_feed_interaction(interaction_type="like")
    with bind(user_id=user, role="parent"):
        return await analytics.emit_event(event_type="seen", user_id=user, metadata={"a": 1}) or await task


asyncio.run(log_memory_posted(memory_id=user))
found: UUID = share()
'''

BAD = [
    "log_memory_posted(memory_idd=user)",
    "log_memory_posted()",
    "log_memory_posted(memory_id=user, media_typ='photo')",
    "log_memory_posted(memory_id=3.5)",
    "log_memory_posted(memory_id=user, media_count='3')",
    "log_memory_posted(memory_id=user, user=user)",
    "log_memory_posted(memory_id=user, user_id=object())",
    "log_memory_posted(user)",
    "log_memory_posted.emit(memory_id=None)",
    "log_album_shared(album_id=user, audience='famly')",
    "log_album_shared(album_id=user, audience='family', sizee=3)",
    "emitter.record_metric(metric_name='a', metric_type='countre', value=1)",
    "analytics.record_metric(metric_name='a', metric_type='countre', value=1)",
    "emitter.record_gauge(metric_name='a', value='1')",
    "emitter.increment_counter(metric='a')",
    "emitter.emit_event(event_type='a', user_id=object())",
    "analytics.emit_event(event_type='a', family_unit_id=object())",
    "emitter.emit_event(event_type='a', metadata='text')",
    "emitter.emit_event(event_type='a', timestamp=3)",
    "emitter.emit_event(event_typ='a')",
    "Emitter(max_agee=1)",
    "Emitter(max_age='soon')",
    "Emitter(redact='password')",
    "Emitter(before_emit=3)",
    "log_feed_interaction(interaction='like')",
    "number: int = log_memory_posted.emit(memory_id=user)",
    "bind(user=user)",
    "bind(user_id=object())",
    "emits('a', source=3)",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a user's project: one module of valid calls, one of invalid ones."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "good.py").write_text(IMPORTS + GOOD)
    (directory / "bad.py").write_text(HEAD + "\n".join(BAD) + "\n")
    return directory


HEAD = f"{IMPORTS}\nfrom good import analytics, emitter, log_album_shared, user\n"
FIRST_LINE = HEAD.count("\n") + 1
"""Of the calls in bad.py."""


def test_mypy_finds_each_wrong_call_and_no_right_one(project: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "good.py", "bad.py"]
    found = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300)
    lines = [line.split(":") for line in found.stdout.splitlines() if ": error: " in line]
    assert not [line for line in lines if line[0] != "bad.py"], found.stdout + found.stderr
    assert "name-defined" not in found.stdout
    assert not missed({int(line[1]) for line in lines}), found.stdout + found.stderr


def test_pyright_finds_each_wrong_call_and_no_right_one(project: Path) -> None:
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    found = subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=300, env=without_network()
    )
    errors = [each for each in json.loads(found.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    assert not [each for each in errors if not each["file"].endswith("bad.py")], found.stdout
    assert "reportUndefinedVariable" not in found.stdout
    assert not missed({each["range"]["start"]["line"] + 1 for each in errors}), found.stdout


def missed(lines: set[int]) -> list[str]:
    return [call for number, call in enumerate(BAD, FIRST_LINE) if number not in lines]


def without_network() -> dict[str, str]:
    """Return an environment in which pyright, complete in its PyPI package, does not check for a newer version."""
    return {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


# ---- completions --------------------------------------------------------------------------------------


class LanguageServer:
    """Pyright's language server, used like by an editor (https://microsoft.github.io/language-server-protocol)."""

    def __init__(self, directory: Path) -> None:
        command = [
            sys.executable,
            "-c",
            "import sys, pyright.langserver; sys.exit(pyright.langserver.main('--stdio'))",
        ]
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=without_network(),
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to: IO[bytes] = self._process.stdin
        self._from: IO[bytes] = self._process.stdout
        self._deadline = threading.Timer(
            120, os.killpg, (self._process.pid, signal.SIGKILL)
        )  # a server that does not answer
        self._deadline.start()
        self._number = 0
        able = {"workspace": {"configuration": True, "workspaceFolders": True}}
        folder = {"uri": directory.as_uri(), "name": "project"}
        self.ask("initialize", {"processId": None, "capabilities": able, "workspaceFolders": [folder]})
        self.notify("initialized", {})

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._to.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self._to.flush()

    def notify(self, method: str, params: Any) -> None:
        self.send({"method": method, "params": params})

    def ask(self, method: str, params: Any) -> Any:
        self._number += 1
        self.send({"id": self._number, "method": method, "params": params})
        while True:
            message = self._receive()
            if message.get("id") == self._number and "method" not in message:
                return message["result"]
            if "id" in message:
                self._answer(message)

    def _answer(self, question: dict[str, Any]) -> None:
        """Respond to the server's request for settings, with the interpreter as the only one."""
        items = question.get("params", {}).get("items", [])
        settings = [
            {"pythonPath": sys.executable} if each.get("section") == "python" else None for each in items
        ]
        self.send({"id": question["id"], "result": settings or None})

    def _receive(self) -> dict[str, Any]:
        length = 0
        while (line := self._from.readline().strip()) or not length:
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        message: dict[str, Any] = json.loads(self._from.read(length))
        return message

    def completions(self, directory: Path, text: str) -> set[str]:
        """Return the completions at the end of the text of a new file."""
        file = directory / f"new{self._number}.py"
        document = {"uri": file.as_uri(), "languageId": "python", "version": 1, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": document})
        lines = text.splitlines()
        position = {"line": len(lines) - 1, "character": len(lines[-1])}
        found = self.ask(
            "textDocument/completion", {"textDocument": {"uri": file.as_uri()}, "position": position}
        )
        return {each["label"] for each in (found["items"] if isinstance(found, dict) else found)}

    def close(self) -> None:
        """Kill it, because it takes about twenty seconds to exit after `exit`."""
        self._deadline.cancel()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._to.close()
        self._from.close()


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[LanguageServer]:
    server = LanguageServer(project)
    yield server
    server.close()


@pytest.mark.parametrize(
    ("call", "fields"),
    [
        ("log_memory_posted(", {"memory_id=", "media_type=", "media_count=", "user_id=", "timestamp="}),
        ("log_album_shared(", {"album_id=", "audience=", "size=", "family_unit_id="}),
        ("Emitter(", {"directory=", "max_age=", "redact=", "before_emit="}),
    ],
)
def test_an_editor_completes_the_fields_of_a_call(
    server: LanguageServer, project: Path, call: str, fields: set[str]
) -> None:
    offered = server.completions(project, f"{HEAD}{call}")
    assert fields <= offered, sorted(offered)[:50]
