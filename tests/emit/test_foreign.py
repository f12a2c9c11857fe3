"""The process belongs to the application: forks in C, closed descriptors, other users, raised exceptions.

Nothing that an application or its server does to its own process loses, repeats or damages a line.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import spool
from spool import Emitter
from spool.fork import uwsgi_problems
from spool.interruption import is_foreign
from spool.segment import SegmentName, recover
from tests.emit.lines import emit, ids, lines, recover_all
from tests.processes import as_root, eventually, free_port

PRELUDE = """
import ctypes, os, signal, sys, threading, time, uuid
from pathlib import Path
from spool import Emitter
user = uuid.uuid4()
def fork_in_c():
    # keeps the GIL and runs no hook, as a server in C does, while no other thread wants the GIL: one that has
    # noted until when it sleeps may still wait for the GIL before it does
    keeper = emitter._housekeeper
    while running := keeper._running:
        asleep_until = running.asleep_until
        time.sleep(0.01)  # releases the GIL, so that the thread can sleep
        if keeper.is_surely_asleep() and running.asleep_until == asleep_until > time.monotonic() + 0.01:
            break
    return ctypes.PyDLL(None).fork()
def emit(emitter, **metadata):
    return emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user, metadata=metadata)
"""


def run(code: str, *arguments: str | Path, timeout: float = 60) -> str:
    """Run code in a separate process, which must succeed; return its output."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr, child.stderr
    return child.stdout


FORKS = """
emitter = Emitter(sys.argv[1], max_age=60)
if sys.argv[2] == "emitted":
    emit(emitter)
    while sys.argv[2] == "emitted" and sys.argv[3] == "spare" and len(list(Path(sys.argv[1]).glob("*.open"))) < 2: pass
children = []
for _ in range(16):
    reader, writer = os.pipe()
    child = fork_in_c()
    if child == 0:
        kept = [emit(emitter, n=n) for n in range(500)]
        os.write(writer, "\\n".join(map(str, kept)).encode())
        os._exit(0)
    os.close(writer)
    children.append((child, reader))
own = [emit(emitter) for _ in range(500)]
for child, reader in children:
    print(open(reader).read())
    os.waitpid(child, 0)
print(*own, sep="\\n")
emitter.close()
"""


@pytest.mark.parametrize("parent", ["emitted", "idle"])
@pytest.mark.parametrize("spare", ["spare", "at once"])
def test_children_forked_in_c_lose_nothing_and_share_no_id(tmp_path: Path, parent: str, spare: str) -> None:
    kept = run(FORKS, tmp_path, parent, spare).split()
    recover_all(tmp_path)
    found = ids(tmp_path)
    assert len(kept) == len(set(kept)) == 17 * 500
    assert set(kept) <= set(found) and len(found) == len(set(found))
    writers = {name.writer for file in tmp_path.iterdir() if (name := SegmentName.parse(file.stem))}
    assert len(writers) == 17


def test_a_child_forked_in_c_frees_its_dead_parents_segment_with_its_first_emit(tmp_path: Path) -> None:
    code = """
emitter = Emitter(sys.argv[1], max_age=60)
emit(emitter)
if fork_in_c() == 0:
    emit(emitter)
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout and parent.stdout.readline() == b"forked\n"
    parent.wait()
    for file in tmp_path.glob("*.open"):
        recover(file)
    assert len(lines(tmp_path)) == 1, "the child's own segment is still its own"
    parent.communicate()


def test_a_fork_is_noticed_if_the_kernel_clears_no_page(tmp_path: Path) -> None:
    code = """
import spool.fork
emitter = Emitter(sys.argv[1], max_age=60)
print(emit(emitter))
time.sleep(0.002)  # a fork within the same millisecond is not noticed
reader, writer = os.pipe()
if fork_in_c() == 0:
    time.sleep(0.002)
    os.write(writer, emit(emitter).encode())
    os._exit(0)
print(os.read(reader, 100).decode())
emitter.close()
"""
    without = "import mmap\nclass Old(mmap.mmap):\n    def madvise(self, *_): raise OSError(22, 'no')\n"
    kept = run(without + "mmap.mmap = Old\n" + code.replace("import spool.fork\n", ""), tmp_path).split()
    recover_all(tmp_path)
    assert sorted(ids(tmp_path)) == sorted(kept)


UWSGI = """
import os, uuid
from spool import get_emitter
user = uuid.uuid4()
if os.environ["AT_IMPORT"] == "1":
    get_emitter().emit_event(event_type="loaded", user_id=user, family_unit_id=user)
def application(environ, start_response):
    made = get_emitter().emit_event(event_type="request", user_id=user, family_unit_id=user)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{made} {os.getpid()}".encode()]
"""


@pytest.fixture
def uwsgi() -> Path:
    found = Path(sys.executable).with_name("uwsgi")
    if not found.exists():
        pytest.skip("uWSGI is not installed: `pip install uwsgi` takes a C compiler")
    return found


@pytest.mark.parametrize("at_import", ["1", "0"])
@pytest.mark.parametrize(
    "options", [(), ("--enable-threads", "--py-call-uwsgi-fork-hooks")], ids=["plain", "hooks"]
)
def test_uwsgi_workers_that_were_forked_from_a_loaded_application(
    tmp_path: Path, uwsgi: Path, at_import: str, options: tuple[str, ...]
) -> None:
    spool, port = tmp_path / "spool", free_port()
    (tmp_path / "application.py").write_text(UWSGI)
    server = subprocess.Popen(
        [uwsgi, "--master", "--processes", "4", "--http-socket", f"127.0.0.1:{port}", "--die-on-term",
         "--disable-logging", "--wsgi-file", "application.py", *options],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"SPOOL_DIR": str(spool), "AT_IMPORT": at_import, "VIRTUAL_ENV": sys.prefix},
    )  # fmt: skip
    try:
        eventually(lambda: answers(port))
        made = [urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().split()[0].decode()
                for _ in range(400)]  # fmt: skip
    finally:
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    recover_all(spool)
    assert len(set(made)) == 400 and "None" not in made
    assert set(made) <= set(ids(spool))
    warned = at_import == "1" and not options
    assert log.count("uWSGI forks its workers without Python's fork hooks") == warned, log


def answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).read())
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "worker", "problems"),
    [
        (set(), 0, 0),
        ({"master", "processes"}, 0, 2),
        ({"master", "processes"}, 1, 1),
        ({"master", "processes"}, 2, 0),
        ({"master", "processes", "enable-threads"}, 0, 1),
        ({"master", "lazy-apps", "enable-threads"}, 1, 0),
        ({"processes", "py-call-uwsgi-fork-hooks", "threads"}, 0, 0),
        ({"http-socket", "enable-threads"}, 0, 0),
    ],
)
def test_uwsgi_options_that_cannot_work_are_known(options: set[str], worker: int, problems: int) -> None:
    assert len(uwsgi_problems(options, worker)) == problems


MASTER = """
import sys, types
sys.modules["uwsgi"] = types.SimpleNamespace(opt={"master": True, "enable-threads": True}, worker_id=lambda: 0)
import threading
emitter = Emitter(sys.argv[1])
emitter.prepare()
assert not list(Path(sys.argv[1]).iterdir())
assert len(os.listdir("/proc/self/task")) == 1
if fork_in_c() == 0:
    sys.modules["uwsgi"].worker_id = lambda: 1
    emitter.prepare()
    os._exit(len(list(Path(sys.argv[1]).glob(f"*-{os.getpid()}-*.open"))) != 1)
assert os.wait()[1] == 0
"""


def test_a_master_that_forks_in_c_has_no_thread_and_its_workers_prepare_themselves(tmp_path: Path) -> None:
    run(MASTER, tmp_path)


CLOSED = """
emitter = Emitter(sys.argv[1], max_age=60, mapped=sys.argv[3] == "mapped", segment_bytes=4096)
kept = [emit(emitter)]
if sys.argv[4] == "stopped":
    emitter._housekeeper.stop()
else:
    while len(list(Path(sys.argv[1]).glob("*.open"))) < 2: pass
os.closerange(3, 256)
own = Path(sys.argv[2])
files = [open(own / str(n), "w+") for n in range(20)]  # of the application, on the descriptors' numbers
for n, file in enumerate(files):
    file.write(f"file {n}")
    file.flush()
kept += [emit(emitter, text="x" * 1000) for _ in range(40)]
assert emitter.seal()
kept += [emit(emitter, text="x" * 1000) for _ in range(40)]
emitter.close()
for n, file in enumerate(files):
    file.seek(0)
    assert file.read() == f"file {n}", n
    file.close()
print(*kept)
"""


@pytest.mark.parametrize("housekeeping", ["running", "stopped"])
@pytest.mark.parametrize("kind", ["mapped", "written"])
def test_a_daemonizing_application_that_closes_all_descriptors_loses_and_gets_nothing(
    tmp_path: Path, kind: str, housekeeping: str
) -> None:
    spool, own = tmp_path / "spool", tmp_path / "own"
    own.mkdir()
    kept = run(CLOSED, spool, own, kind, housekeeping).split()
    recover_all(spool)
    assert "None" not in kept and len(kept) == 81
    assert sorted(ids(spool)) == sorted(kept)
    assert {file.read_text() for file in own.iterdir()} == {f"file {n}" for n in range(20)}


def test_a_mapped_segment_stays_locked_without_its_descriptor(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=60)
    kept = emit(emitter)
    (file,) = [each for each in tmp_path.glob("*.open") if each.read_bytes().strip(b"\0")]
    segment = emitter._appender._state.current
    assert segment is not None and segment._file is not None
    os.close(segment._file._fd)
    assert recover(file) is None
    emitter.close()
    assert ids(tmp_path) == [kept]


PRIVILEGES = """
import logging
logging.basicConfig()
emitter = Emitter(sys.argv[1], max_age=0.1)
kept = [emit(emitter)]
os.setgid(65534)
os.setuid(65534)
kept += [emit(emitter) for _ in range(10)]
deadline = time.monotonic() + 20
while not Path(sys.argv[2]).exists() and time.monotonic() < deadline: time.sleep(0.01)
print(*filter(None, kept), flush=True)
"""


@as_root
def test_what_was_written_before_privileges_were_dropped_is_loadable_while_the_process_lives(
    tmp_path: Path,
) -> None:
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    spool, done = tmp_path / "spool", tmp_path / "done"
    spool.mkdir(mode=0o750)
    child = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + PRIVILEGES, spool, done],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        eventually(lambda: [recover(file) for file in spool.glob("*.open")] and len(lines(spool)) == 11)
    finally:
        done.touch()
        kept, log = child.communicate(timeout=60)
    assert sorted(ids(spool)) == sorted(kept.split())
    assert "could not seal" in log and "runs as user 65534" in log and "write permission" in log


class SoftTimeLimitExceeded(Exception):
    """An exception like Celery's."""


@pytest.fixture
def raising() -> Iterator[None]:
    """A signal handler that raises. In a callback of the garbage collector, as hypothesis has one, the
    interpreter would only report the exception: so there is no collection.
    """

    def handler(*_: object) -> None:
        raise SoftTimeLimitExceeded

    previous = signal.signal(signal.SIGALRM, handler)
    gc.disable()
    yield
    gc.enable()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("mapped", [True, False])
def test_an_exception_of_the_applications_signal_handler_ends_the_emit_and_is_no_drop(
    tmp_path: Path, mapped: bool
) -> None:
    emitter = Emitter(tmp_path, segment_bytes=8192, mapped=mapped)
    kept = []
    for _ in range(200):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
            while True:
                kept.append(emit(emitter))
        except SoftTimeLimitExceeded:
            continue
    emitter.close()
    assert emitter.stats().dropped == {} and None not in kept
    found = ids(tmp_path)
    assert set(filter(None, kept)) <= set(found) and len(found) == len(set(found))


def test_an_exception_that_another_thread_sets_is_raised(tmp_path: Path) -> None:
    code = """
class Cancelled(Exception): pass
emitter = Emitter(sys.argv[1])
emit(emitter)
# While a thread starts another one, that has its identifier for a moment and may get the exception in its place (CPython 3.11).
while len(list(Path(sys.argv[1]).glob("*.open"))) < 2: pass
def work():
    try:
        while True:
            begun.set()
            emit(emitter)
    except Cancelled:
        print("cancelled")
for _ in range(50):
    begun = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    time.sleep(0.002)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Cancelled))
    thread.join(10)
emitter.close()
print(dict(emitter.stats().dropped))
"""
    assert run(code, tmp_path).split("\n")[:51] == ["cancelled"] * 50 + ["{}"]


@pytest.mark.parametrize(
    ("place", "foreign"),
    [
        (spool.__file__, True),
        (os.__file__, True),
        ("<frozen posixpath>", True),
        ("/srv/application.py", False),
    ],
)
def test_an_exception_of_an_unknown_kind_is_the_applications_unless_a_value_raised_it(
    place: str, foreign: bool
) -> None:
    """An exception set by another thread may be raised in the standard library, which an emit calls."""
    with pytest.raises(SoftTimeLimitExceeded) as raised:
        exec(compile("raise error", place, "exec"), {"error": SoftTimeLimitExceeded()})  # noqa: S102  # ends there
    raised.value.__traceback__ = raised.tb.tb_next
    assert is_foreign(raised.value) is foreign


AT_THE_RECURSION_LIMIT = """
emitter = Emitter(sys.argv[1], segment_bytes=4096)
text = "x" * 1500
results = []
def down(depth):
    if depth:
        down(depth - 1)
    else:
        results.append(emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user, metadata={"text": text}))
reached = 0
for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
    if sys.argv[2] == "sealed":
        emitter.seal()
    try:
        down(depth)
        reached = depth
    except RecursionError as error:
        trace = error.__traceback__
        while trace is not None:
            last, trace = trace.tb_frame.f_code.co_name, trace.tb_next
        assert last == "down", f"raised inside of {last}"
emitter.close()
assert reached
assert results.count(None) == sum(emitter.stats().dropped.values()) > 0
print(*filter(None, results))
"""


@pytest.mark.no_coverage
@pytest.mark.parametrize("segment", ["open", "sealed"])
def test_an_emit_at_the_recursion_limit_is_dropped_and_counted(tmp_path: Path, segment: str) -> None:
    """Also the first line of a segment, which is written one call deeper."""
    acknowledged = run(AT_THE_RECURSION_LIMIT, tmp_path, segment).split()
    assert sorted(ids(tmp_path)) == sorted(acknowledged)


AT_EXIT = {
    "finalizer": """
class Last:
    def __del__(self): emit(emitter, last=True)
last = Last()
import builtins
builtins.keep = last
""",
    "generator": """
def steps():
    with emitter.timer("step_ms"):
        yield 1

generator = steps()
next(generator)
import builtins
builtins.keep = generator
""",
    "atexit": """
import atexit
atexit.register(lambda: emit(emitter, last=True))
""",
    "daemon thread": """
def work():
    while True: emit(emitter)
threading.Thread(target=work, daemon=True).start()
""",
    "many drops": """
class Last:
    def __del__(self): emitter.increment_counter(metric_name="hits", value=-1)
import builtins
builtins.keep = Last()
""",
}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("kind", AT_EXIT)
def test_a_process_that_emits_at_its_very_end_ends(tmp_path: Path, kind: str, prepared: bool) -> None:
    before = "emitter = Emitter(sys.argv[1])\n" + ("emit(emitter)\n" if prepared else "")
    run(before + AT_EXIT[kind], tmp_path, timeout=20)
    recover_all(tmp_path)
    if kind in ("finalizer", "generator", "atexit"):
        assert len(lines(tmp_path)) == 1 + prepared


def test_a_platform_without_segments_imports_drops_counts_and_warns_once(tmp_path: Path) -> None:
    code = """
import sys
sys.platform = "win32"
sys.modules["fcntl"] = None
import os
for name in ("register_at_fork", "posix_fallocate", "pread", "pwrite", "fchmod", "fork", "O_NOFOLLOW", "O_CLOEXEC",
             "O_NONBLOCK", "O_DIRECTORY"):
    delattr(os, name)
import logging, time, uuid
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import spool, spool.asgi, spool.events
emitter, user = spool.Emitter(sys.argv[1], max_age=0.05), uuid.uuid4()
emitter.prepare()
assert not any(emitter.emit_event(event_type="tick", user_id=user, family_unit_id=user) for _ in range(100))
time.sleep(0.5)
emitter.seal()
emitter.close()
print(emitter.stats())
"""
    child = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=30)
    assert child.returncode == 0 and not child.stderr, child.stderr
    assert child.stdout.count("analytics line dropped (unsupported)") == 1, child.stdout
    assert "dropped={'unsupported': 100}" in child.stdout
    assert not list(tmp_path.iterdir())


def test_if_space_cannot_be_reserved_lines_are_written(tmp_path: Path) -> None:
    """For example on macOS, which has no posix_fallocate."""
    code = """
emitter = Emitter(sys.argv[1], max_age=0.05)
print(*[emit(emitter) for _ in range(1000)])
emitter.close()
"""
    before = "import os, sys\nsys.platform = 'darwin'\ndel os.posix_fallocate\n"
    kept = subprocess.run(
        [sys.executable, "-c", before + PRELUDE + code, tmp_path], capture_output=True, text=True, timeout=30
    )
    assert sorted(ids(tmp_path)) == sorted(kept.stdout.split()), kept.stderr


def test_no_thread_is_left_at_a_fork_and_housekeeping_continues_in_the_parent(tmp_path: Path) -> None:
    """Python 3.12 and later warn about a fork of a process with threads."""
    code = """
import warnings
warnings.simplefilter("error")
emitter = Emitter(sys.argv[1], max_age=0.05)
emit(emitter)
for _ in range(50):
    child = os.fork()
    if child == 0:
        os._exit(not emit(emitter))
    assert os.waitpid(child, 0)[1] == 0
emit(emitter)
deadline = time.monotonic() + 10
sealed = lambda: Path(sys.argv[1]).glob(f"*-{os.getpid()}-*.ndjson")
while sum(len(file.read_text().splitlines()) for file in sealed()) < 2:
    assert time.monotonic() < deadline
"""
    run(code, tmp_path)
    recover_all(tmp_path)
    assert len(lines(tmp_path)) == 52


def test_a_slow_log_handler_does_not_slow_an_emit(tmp_path: Path) -> None:
    code = """
import logging
class Slow(logging.Handler):
    def emit(self, record): time.sleep(2)
logging.getLogger().addHandler(Slow())
Path(sys.argv[1]).write_text("a file, not a directory")
emitter = Emitter(sys.argv[1], max_age=0.1)
begin = time.monotonic()
for _ in range(100):
    emit(emitter)
    emitter.increment_counter(metric_name="hits", value=-1)
print(time.monotonic() - begin)
os._exit(0)
"""
    assert float(run(code, tmp_path / "spool")) < 1


def test_stats_count_without_a_lock_or_a_file(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=60)
    for number in range(1, 200):
        emit(emitter)
        assert emitter.stats().emitted == number
    emitter._appender.hold()
    counted: list[int] = []
    thread = threading.Thread(target=lambda: counted.append(emitter.stats().emitted), daemon=True)
    thread.start()
    thread.join(5)
    emitter._appender.release()
    assert counted == [199]
    emitter.close()
    stats = emitter.stats()
    assert (stats.emitted, stats.bytes) == (199, sum(file.stat().st_size for file in tmp_path.iterdir()))


def test_a_prepared_process_has_a_segment_and_a_thread_before_its_first_emit(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    emitter.prepare()
    assert len(list(tmp_path.glob("*.open"))) == 1
    assert emitter.stats().segments == 0
    if (child := os.fork()) == 0:
        deadline = time.monotonic() + 20
        while not list(tmp_path.glob(f"*-{os.getpid()}-*.open")) and time.monotonic() < deadline:
            time.sleep(0.01)  # releases the GIL, so that the thread can sleep
        os._exit(not list(tmp_path.glob(f"*-{os.getpid()}-*.open")))
    assert os.waitpid(child, 0)[1] == 0
    emitter.close()
    recover_all(tmp_path)
    assert not list(tmp_path.iterdir())
