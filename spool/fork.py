"""Resets the state in a forked process, whether or not the fork ran Python's hooks.

A fork in C (uWSGI without `--py-call-uwsgi-fork-hooks`, an embedding server) runs no hook, and the child
would continue with its parent's map, write position, writer token and ids. So `MARK` is on a page that the
kernel clears in every child (madvise(2), MADV_WIPEONFORK, Linux 4.14). Each emit first reads its one byte (6
ns) and calls `notice` if it is 0. `check_pid`, an `os.getpid` once per millisecond, is only for kernels
without such pages: it misses a fork within the same millisecond.

With Python's hooks, the housekeeping threads end before the fork, so that the child has no copy of a
half-changed state, and Python 3.12 and later do not warn about threads. The parent restarts its own thread.

One case cannot be repaired from inside the process: a child that was forked in C while another thread of the
parent was waiting for the GIL waits forever for that thread to take it, before any of our code runs. So
uWSGI's options are checked, and problems are logged once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from spool.log import logger

_MADV_WIPEONFORK: Final = 18  # Python does not define it


def _wiped_on_fork() -> mmap.mmap | bytearray:
    if sys.platform == "linux":
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            page.madvise(_MADV_WIPEONFORK)
        except OSError:
            page.close()
        else:
            return page
    return bytearray(1)


MARK: Final = _wiped_on_fork()
"""Its first byte is 0 in a forked process that has not noticed the fork yet."""
MARK[0] = 1
NOTICED: Final = ctypes.c_bool.from_buffer(MARK)
"""The first byte of `MARK`. `if not NOTICED` takes 6 ns, `MARK[0]` 17 ns."""
KERNEL_WIPES: Final = not isinstance(MARK, bytearray)


class Forked(Protocol):
    """An object with a separate state in each process."""

    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None:
        """Start as a new process, unless the final check of `MARK[0]` shows that a signal handler has done so."""


_members: weakref.WeakSet[Forked] = weakref.WeakSet()
_in_child: list[Callable[[], None]] = []
_forking = threading.local()
_pid = os.getpid()
# A lock held by another thread at the fork stays held in the child forever, so each process has its own.
_noticing: dict[int, threading.RLock] = {}


def add(member: Forked) -> None:
    """Call the object's methods at each fork, as long as it exists."""
    _members.add(member)


def in_child(work: Callable[[], None]) -> None:
    """Call `work` in each forked process, before the methods of the objects registered by `add`."""
    _in_child.append(work)


def notice() -> None:
    """Start as a new process if this one was forked and has not done so. Safe in any thread or handler."""
    global _pid
    with _noticing.setdefault(os.getpid(), threading.RLock()):
        for work in _in_child if not MARK[0] else ():
            work()
        for member in list(_members):
            if not MARK[0]:
                member.after_fork_in_child()
        _pid = os.getpid()
        MARK[0] = 1


def check_pid() -> None:
    """Detect a fork on kernels that do not clear the page. A system call, but one that keeps the GIL."""
    if os.getpid() != _pid:
        MARK[0] = 0
        notice()


def _before_fork() -> None:
    _forking.members = list(_members)
    for member in _forking.members:
        member.before_fork()


def _after_fork_in_parent() -> None:
    for member in _forking.members:
        member.after_fork_in_parent()


def _after_fork_in_child() -> None:
    MARK[0] = 0
    notice()


if sys.platform != "win32":
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )


# ---- servers that fork in C ---------------------------------------------------------------------------

_HOOKS: Final = "set py-call-uwsgi-fork-hooks, or lazy-apps to load the application in each worker"
_THREADS: Final = "set enable-threads"
_warned: set[str] = set()


def _uwsgi() -> tuple[set[str], int]:
    """Return the names of uWSGI's options (none outside uWSGI) and the number of this worker."""
    uwsgi = sys.modules.get("uwsgi")
    options: Mapping[object, object] = getattr(uwsgi, "opt", {})
    names = {name.decode() if isinstance(name, bytes) else str(name) for name in options}
    return names, uwsgi.worker_id() if uwsgi is not None and hasattr(uwsgi, "worker_id") else 0


def will_fork_without_hooks() -> bool:
    """Whether this is a uWSGI master that forks its workers in C, so that a thread here may make a worker hang."""
    return forks_without_hooks(*_uwsgi())


def forks_without_hooks(options: set[str], worker: int) -> bool:
    forks = options & {"master", "M", "processes", "workers", "p", "cheaper"}
    hooked = options & {"lazy-apps", "lazy", "py-call-uwsgi-fork-hooks"}
    return worker == 0 and bool(forks) and not hooked


def warn_about_server() -> None:
    """Log, once, uWSGI options under which an emitter cannot keep its guarantees."""
    for problem in uwsgi_problems(*_uwsgi()):
        if problem not in _warned:
            _warned.add(problem)
            logger().warning("%s", problem)


def uwsgi_problems(options: set[str], worker: int) -> list[str]:
    """Return the problems of uWSGI's options for an emitter created in that worker (0: the master).

    An emitter created in a worker needs no fork hook. Only one worker reports, for all of them.

    See https://uwsgi-docs.readthedocs.io/en/latest/Options.html.
    """
    if not options or worker > 1:
        return []
    problems = []
    if forks_without_hooks(options, worker):
        problems.append(
            f"uWSGI forks its workers without Python's fork hooks; a worker may hang when it starts: {_HOOKS}"
        )
    if not options & {"enable-threads", "T", "threads", "gevent", "master-as-root-threads"}:
        problems.append(
            f"uWSGI runs no Python threads, so segments are sealed by the next request or at exit: {_THREADS}"
        )
    return problems
