"""Each system call for creating, sealing and rotating segments fails in turn: nothing raises into the application,
and each acknowledged event exists once.

strace(1) injects the failures in a child process, from the moment it is attached.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.emit.lines import ids, recover_all
from tests.processes import eventually, needs_strace

pytestmark = pytest.mark.no_coverage
CALLS = (
    "openat", "flock", "fallocate", "ftruncate", "rename", "unlink", "mkdir", "newfstatat", "pread64",
    "madvise", "getdents64", "fsync", "close",
)  # fmt: skip
CHILD = """
import sys, uuid
from spool import Emitter
user = uuid.uuid4()
print("ready", flush=True)
sys.stdin.readline()
emitter = Emitter(sys.argv[1], segment_bytes=4096, max_age=0.05, fsync=True)
kept = []
for n in range(12):
    kept.append(emitter.emit_event(
        event_type="tick", user_id=user, family_unit_id=user, metadata={"text": "x" * 900}))
    if n == 6:
        emitter.seal()
emitter.close()
print(*filter(None, kept))
"""


def fail(spool: Path, log: Path, call: str, error: str, nth: int) -> tuple[list[str], bool]:
    """Fail the nth `call` of each thread; return the acknowledged ids and whether any came that far."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(spool)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout and child.stdin
    child.stdout.readline()
    inject = f"inject={call}:error={error}:when={nth}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-o", log, "-e", f"trace={call}", "-e", inject, "-p", str(child.pid)]
    )
    eventually(lambda: "TracerPid:\t0\n" not in Path(f"/proc/{child.pid}/status").read_text())
    printed, errors = child.communicate("\n", timeout=60)
    tracer.wait(timeout=60)
    assert child.returncode == 0 and "Traceback" not in errors, f"{inject}: {errors}"
    return printed.split(), "(INJECTED)" in log.read_text()


def enumerate_failures(tmp_path: Path, call: str, error: str) -> int:
    """Fail the first call, the second, ... until a run has no more; return how many there were."""
    for nth in range(1, 200):
        spool = tmp_path / f"{call}-{error}-{nth}"
        kept, reached = fail(spool, tmp_path / "log", call, error, nth)
        recover_all(spool)
        found = ids(spool)
        assert set(kept) <= set(found), f"lost when the {nth}. {call} fails with {error}"
        assert len(found) == len(set(found)), f"twice when the {nth}. {call} fails with {error}"
        if not reached:
            assert len(kept) == 12
            return nth - 1
    raise AssertionError(f"there is no end of {call}")


@needs_strace
@pytest.mark.parametrize("call", ["openat", "fallocate", "ftruncate", "rename"])
def test_any_call_may_fail(tmp_path: Path, call: str) -> None:
    assert enumerate_failures(tmp_path, call, "EIO") >= 3


@needs_strace
@pytest.mark.long
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EMFILE", "EACCES", "EINTR"])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail_with_any_error(tmp_path: Path, call: str, error: str) -> None:
    enumerate_failures(tmp_path, call, error)
