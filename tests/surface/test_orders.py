"""Whatever the order of requests and jobs, each event has its own identity or none.

Requests with and without users, some to an excluded path, and their jobs are interleaved: ASGI requests as
tasks of one event loop, WSGI requests and jobs on four shared threads. The metadata of each event has its
expected user.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spool import Emitter, asgi, wsgi
from spool.context import arrived, begin, carried, in_force, scope, update
from spool.testing import Recorder, record

THREADS = 4
AT_ONCE = 50
LONG = 20_000


@dataclass(frozen=True)
class Work:
    """A request: its interface, whether a user is logged in, and the job that it sends, if any."""

    kind: str
    known: bool
    path: str
    job: str | None
    pauses: int
    siblings: int = 0
    """Tasks of an ASGI request that act for somebody else each, at once."""


WORK = st.builds(
    Work, st.sampled_from(["asgi", "wsgi"]), st.booleans(), st.sampled_from(["/", "/health"]),
    st.sampled_from([None, "scope", "celery", "rq"]), st.integers(0, 3),
    st.integers(0, 3),
)  # fmt: skip


class Site:
    """An application behind both middlewares, with threads that serve requests and jobs."""

    def __init__(self, emitter: Emitter, works: Sequence[Work], threads: ThreadPoolExecutor) -> None:
        self.emitter = emitter
        self.works = works
        self.threads = threads
        self.jobs: list[Future[None]] = []
        self.asgi = asgi.AnalyticsMiddleware(self.asgi_application, emitter=emitter, exclude=["/health"])
        self.wsgi = wsgi.AnalyticsMiddleware(self.wsgi_application, emitter=emitter, exclude=["/health"])

    def emit(self, number: int, user: str | None) -> None:
        self.emitter.emit_event(event_type="acted", metadata={"number": number, "expected": user})

    def log_in(self, number: int) -> str | None:
        """Emit without a user, then as the user, and send the job. Return the user."""
        self.emit(number, None)
        user = str(uuid.UUID(int=number + 1)) if self.works[number].known else None
        if user is not None:
            update(user_id=user, family_unit_id=user)
        self.emit(number, user)
        if (kind := self.works[number].job) is not None:
            self.jobs.append(self.threads.submit(JOBS[kind], self, number, user, carried()))
        return user

    async def asgi_application(self, scope: asgi.Message, _: asgi.Receive, send: asgi.Send) -> None:
        number = scope["number"]
        user = self.log_in(number)
        siblings = range(self.works[number].siblings)
        tasks = [asyncio.create_task(self.sibling(number, user, other)) for other in siblings]
        for _pause in range(self.works[number].pauses):
            await asyncio.sleep(0)  # let another request run
            self.emit(number, user)
        await asyncio.gather(*tasks)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async def sibling(self, number: int, user: str | None, other: int) -> None:
        """Emit for the logged-in user, then for a different user, like a task that processes a list of users."""
        await asyncio.sleep(0)
        self.emit(number, user)
        own = str(uuid.UUID(int=(number + 1) << 8 | other))
        update(user_id=own, family_unit_id=own)
        await asyncio.sleep(0)
        self.emit(number, own)

    def wsgi_application(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        user = self.log_in(environ["number"])
        start("200 OK", [])

        def pieces() -> Iterator[bytes]:
            for _ in range(self.works[environ["number"]].pauses):
                self.emit(environ["number"], user)
                yield b"x"

        return pieces()

    async def serve(self) -> None:
        """Serve all requests, at most AT_ONCE at a time."""
        free = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(self._serve_one(number, free) for number in range(len(self.works))))

    async def _serve_one(self, number: int, free: asyncio.Semaphore) -> None:
        async with free:
            if self.works[number].kind == "wsgi":
                environ = {"PATH_INFO": self.works[number].path, "REQUEST_METHOD": "GET", "number": number}
                run = asyncio.get_running_loop().run_in_executor
                await run(self.threads, lambda: self._consume(environ))
                return
            request: asgi.Message = {
                "type": "http", "path": self.works[number].path, "method": "GET", "headers": [], "number": number,
            }  # fmt: skip
            await self.asgi(request, _nothing, _ignored)

    def _consume(self, environ: dict[str, Any]) -> None:
        response = self.wsgi(environ, lambda *_: None)
        list(response)
        response.close()  # type: ignore[attr-defined]  # like a server, if the response has `close`
        assert in_force() is None


async def _nothing() -> asgi.Message:
    return {"type": "http.disconnect"}


async def _ignored(_: asgi.Message) -> None:
    pass


def _act(site: Site, number: int, user: str | None) -> None:
    site.emit(number, user)
    update(user_id=uuid.UUID(int=0), family_unit_id=uuid.UUID(int=0))  # must not outlive the job


def scope_job(site: Site, number: int, user: str | None, values: Any) -> None:
    with scope(**values):
        _act(site, number, user)
    assert in_force() is None


def celery_job(site: Site, number: int, user: str | None, values: Any) -> None:
    from spool import celery

    task = SimpleNamespace(request=SimpleNamespace(is_eager=False, **{celery.HEADER: values}))
    celery._begin(task)
    _act(site, number, user)
    celery._end(task)
    assert in_force() is None


def rq_job(site: Site, number: int, user: str | None, values: Any) -> None:
    with scope(**arrived(values)):  # like spool.rq.Job.perform
        _act(site, number, user)
    assert in_force() is None


JOBS: dict[str, Callable[[Site, int, str | None, Any], None]] = {
    "scope": scope_job, "celery": celery_job, "rq": rq_job,
}  # fmt: skip


def served(directory: Path, works: Sequence[Work]) -> Recorder:
    with (
        closing(Emitter(directory, identity="optional")) as emitter,
        record(emitter) as recorder,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        site = Site(emitter, works, threads)
        asyncio.run(site.serve())
        for job in site.jobs:
            job.result()
    return recorder


def check(directory: Path, works: Sequence[Work]) -> None:
    events = served(directory, works).of("acted")
    siblings = sum(2 * work.siblings for work in works if work.kind == "asgi")
    assert len(events) == siblings + sum(2 + work.pauses + (work.job is not None) for work in works)
    wrong = [event for event in events if event["user_id"] != event["metadata"]["expected"]]
    assert wrong == []


@given(works=st.lists(WORK, max_size=60))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_event_carries_another_identity_in_any_order(tmp_path: Path, works: list[Work]) -> None:
    pytest.importorskip("celery")
    check(tmp_path, works)


@pytest.mark.long
def test_no_event_of_20_000_requests_carries_another_identity(tmp_path: Path) -> None:
    pytest.importorskip("celery")
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chosen = random.Random(seed)
    works = [
        Work(
            chosen.choice(["asgi", "wsgi"]), chosen.random() < 0.5, chosen.choice(["/", "/health"]),
            chosen.choice([None, *JOBS]), chosen.randrange(4), chosen.randrange(3),
        )
        for _ in range(LONG)
    ]  # fmt: skip
    check(tmp_path, works)


def test_the_check_finds_a_scope_that_inherits_who_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reintroduce the fault: a job that inherits the context of its thread."""

    def leaking(site: Site, number: int, user: str | None, _: Any) -> None:
        begin()
        _act(site, number, user)

    monkeypatch.setitem(JOBS, "scope", leaking)
    with pytest.raises(AssertionError):
        check(tmp_path, [Work("wsgi", known, "/", "scope", 1) for known in (True, False) * 20])
