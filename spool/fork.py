"""A forked process begins as a new one, whether or not the fork ran Python's hooks.

A fork in C (uWSGI without `--py-call-uwsgi-fork-hooks`, an embedding server) runs no hook, and the child
would go on with its parent's map, write position, writer token and ids. So `MARK` lies on a page that the
kernel clears in every child (madvise(2), MADV_WIPEONFORK, Linux 4.14); whoever emits reads its one byte
first (6 ns) and calls `notice` if it is 0. `os.getpid` once per millisecond, `check_pid`, is only for
kernels that have no such page: it misses a fork within the same millisecond.

With Python's hooks, the housekeeping threads end before the fork, so that the child has no copy of a state
that is half changed, and Python 3.12 and later do not warn about threads; the parent starts its own again.

What cannot be repaired from inside: a child forked in C while another thread of the parent wanted the GIL
waits for that thread to take it, forever, before any code of ours runs. So uWSGI's options are checked and
reported, once.
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

_MADV_WIPEONFORK: Final = 18  # Python has no name for it


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
"""Its first byte is 0 in a process that is a fork and has not noticed."""
MARK[0] = 1
NOTICED: Final = ctypes.c_bool.from_buffer(MARK)
"""The same byte, read by `if not NOTICED` in 6 ns instead of the 17 ns of `MARK[0]`."""
KERNEL_WIPES: Final = not isinstance(MARK, bytearray)


class Forked(Protocol):
    """What has a state of its own in each process."""

    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None:
        """Begin as a new process, unless `MARK[0]` says by the last step that a signal handler has done it all."""


_members: weakref.WeakSet[Forked] = weakref.WeakSet()
_in_child: list[Callable[[], None]] = []
_forking = threading.local()
_pid = os.getpid()
# A lock that another thread held at the fork stays held in the child forever, so each process has its own.
_noticing: dict[int, threading.RLock] = {}


def add(member: Forked) -> None:
    """Call its methods at each fork, as long as it lives."""
    _members.add(member)


def in_child(work: Callable[[], None]) -> None:
    """Have `work` done in each forked process, before anything of its members."""
    _in_child.append(work)


def notice() -> None:
    """Begin as a new process if this one is a fork that has not done so. Safe in any thread or handler."""
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
    """Notice a fork where the kernel does not clear the page. A system call, but one that keeps the GIL."""
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
    """Return the names of uWSGI's options, none without uWSGI, and the number of this worker."""
    uwsgi = sys.modules.get("uwsgi")
    options: Mapping[object, object] = getattr(uwsgi, "opt", {})
    names = {name.decode() if isinstance(name, bytes) else str(name) for name in options}
    return names, uwsgi.worker_id() if uwsgi is not None and hasattr(uwsgi, "worker_id") else 0


def will_fork_without_hooks() -> bool:
    """Whether this is uWSGI's master, which forks its workers in C: a thread here may make one hang."""
    return forks_without_hooks(*_uwsgi())


def forks_without_hooks(options: set[str], worker: int) -> bool:
    forks = options & {"master", "M", "processes", "workers", "p", "cheaper"}
    hooked = options & {"lazy-apps", "lazy", "py-call-uwsgi-fork-hooks"}
    return worker == 0 and bool(forks) and not hooked


def warn_about_server() -> None:
    """Log, once, if uWSGI runs with options under which an emitter cannot keep all it promises."""
    for problem in uwsgi_problems(*_uwsgi()):
        if problem not in _warned:
            _warned.add(problem)
            logger().warning("%s", problem)


def uwsgi_problems(options: set[str], worker: int) -> list[str]:
    """Return what is wrong with uWSGI's options for an emitter of that worker, 0 for the master.

    An emitter that is made in a worker is not forked; one worker reports for all.

    See https://uwsgi-docs.readthedocs.io/en/latest/Options.html.
    """
    if not options or worker > 1:
        return []
    problems = []
    if forks_without_hooks(options, worker):
        problems.append(
            f"uWSGI forks its workers without Python's fork hooks; a worker may hang at its start: {_HOOKS}"
        )
    if not options & {"enable-threads", "T", "threads", "gevent", "master-as-root-threads"}:
        problems.append(
            "uWSGI runs no Python threads, so that segments are sealed by the next request or at the end: "
            f"{_THREADS}"
        )
    return problems
