"""A Django site with users and `spool.django` in its MIDDLEWARE, for processes of their own.

    SITE=<a directory> python -c "from tests.surface import django_site; django_site.serve_cases()"

A line on standard input is a case, as JSON: a child runs its script with its settings in place of those here, and
writes what was recorded, and what the script left in `result`, to the case's file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import django
from django.conf import settings
from django.contrib.auth import aauthenticate, alogin, alogout, authenticate, login, logout
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.test import override_settings
from django.urls import include, path, re_path

from spool import get_emitter
from spool.context import update
from spool.testing import record

HOME = Path(os.environ["SITE"])
FAMILY = UUID("0190163d-8694-739b-aea5-966c26f8ad92")


def user(request: Any) -> Any:
    if not request.user.is_authenticated:
        return None
    return {"user_id": UUID(int=request.user.pk), "family_unit_id": FAMILY, "role": "parent"}


async def user_async(request: Any) -> Any:
    known = await request.auser()
    return {"user_id": UUID(int=known.pk), "family_unit_id": FAMILY} if known.is_authenticated else None


def user_fails(request: Any) -> Any:
    raise LookupError("the application's own")


def emit(name: str) -> None:
    get_emitter().emit_event(event_type=name)


def item(request: Any, item: int, who: str = "") -> HttpResponse:
    emit("item_viewed")
    return HttpResponse(str(item))


async def item_async(request: Any, item: int) -> HttpResponse:
    emit("item_viewed")
    return HttpResponse(str(item))


def fails(request: Any) -> HttpResponse:
    raise LookupError("the application's own")


def stream(request: Any) -> StreamingHttpResponse:
    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            emit("piece_sent")
            yield b"piece"

    return StreamingHttpResponse(pieces())


async def stream_async(request: Any) -> StreamingHttpResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            emit("piece_sent")
            yield b"piece"
            await asyncio.sleep(0)

    return StreamingHttpResponse(pieces())


def file(request: Any) -> FileResponse:
    return FileResponse((HOME / "photo").open("rb"))


def enter(request: Any) -> HttpResponse:
    login(request, authenticate(request, username="anna", password="secret"))
    emit("came")
    return HttpResponse("in")


def leave(request: Any) -> HttpResponse:
    logout(request)
    emit("went")
    return HttpResponse("out")


async def enter_async(request: Any) -> HttpResponse:
    await alogin(request, await aauthenticate(request, username="anna", password="secret"))
    emit("came")
    return HttpResponse("in")


async def leave_async(request: Any) -> HttpResponse:
    await alogout(request)
    emit("went")
    return HttpResponse("out")


def guard(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda request: HttpResponse(status=418) if "locked" in request.GET else get_response(request)


def bind_by_hand(request: Any) -> HttpResponse:
    update(user_id=FAMILY, family_unit_id=FAMILY)
    emit("item_viewed")
    return HttpResponse("x")


urlpatterns = [
    path("items/<int:item>", item), path("async/items/<int:item>", item_async), path("fails", fails),
    path("of/<slug:who>/", include([path("<int:item>", item)])), re_path(r"^years/(?P<item>[0-9]{4})$", item),
    path("stream", stream), path("async/stream", stream_async), path("file", file), path("hand", bind_by_hand),
    path("in", enter), path("out", leave), path("async/in", enter_async), path("async/out", leave_async),
]  # fmt: skip

(HOME / "photo").write_bytes(b"x" * 100_000)
settings.configure(
    ROOT_URLCONF="tests.surface.django_site",
    ALLOWED_HOSTS=["*"],
    SECRET_KEY="x",
    MIDDLEWARE=[
        "spool.django.AnalyticsMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "tests.surface.django_site.guard",
    ],
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(HOME / "site.sqlite")}},
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
    MIGRATION_MODULES={"auth": None, "contenttypes": None},
)
django.setup()


def serve_cases() -> None:
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", run_syncdb=True, verbosity=0)
    User.objects.create_user("anna", password="secret", id=7)
    connection.close()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
            os._exit(0)
        os.waitpid(child, 0)
        print(flush=True)


def run(script: str, file: str, settings: dict[str, Any]) -> None:
    log = Path(file).with_suffix(".log").open("w")
    os.dup2(log.fileno(), sys.stderr.fileno())
    variables: dict[str, Any] = {"result": None}
    with override_settings(**settings), record(strict=False) as recorded:
        try:
            exec(script, variables)  # noqa: S102  # a case of the tests
        except BaseException:
            traceback.print_exc()
            raise
    ended = {"records": recorded.records, "result": variables["result"]}
    Path(file).write_text(json.dumps(ended, default=repr))
