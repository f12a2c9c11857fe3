"""A minimal family photo application that uses the whole public interface.

    SPOOL_DIR=/tmp/spool uvicorn loader.demo.application:app --workers 4

The headers `X-User`, `X-Family`, `X-Session` and `X-Role` identify the caller, as set by a gateway that has
checked a token.
"""

from __future__ import annotations

import uuid
from typing import Annotated
from uuid import UUID

from fastapi import BackgroundTasks, Depends, FastAPI, Header, HTTPException

from spool import get_analytics_service
from spool.asgi import AnalyticsMiddleware
from spool.context import update
from spool.events import emits, log_feed_viewed, log_memory_posted, log_reaction_created, log_user_logged_in
from spool.metrics import log_feed_interaction

app = FastAPI()
app.add_middleware(AnalyticsMiddleware, exclude=("/health",))
analytics = get_analytics_service()


def caller(
    x_user: Annotated[UUID, Header()],
    x_family: Annotated[UUID, Header()],
    x_session: Annotated[UUID | None, Header()] = None,
    x_role: Annotated[str | None, Header()] = None,
) -> None:
    """Bind the caller's identity. FastAPI runs this in a thread."""
    update(user_id=x_user, family_unit_id=x_family, session_id=x_session, role=x_role)


Caller = Depends(caller)


@app.get("/health")
async def health() -> str:
    return "fine"


@app.post("/login", dependencies=[Caller])
async def login() -> dict[str, UUID]:
    await log_user_logged_in(method="password")
    return {"session": uuid.uuid4()}


@app.post("/memories", status_code=201, dependencies=[Caller])
async def post_memory(tasks: BackgroundTasks, media_count: int = 1) -> dict[str, UUID]:
    memory_id = uuid.uuid4()
    tasks.add_task(log_memory_posted, memory_id=memory_id, media_type="photo", media_count=media_count)
    return {"id": memory_id}


@app.get("/memories/{memory_id}", dependencies=[Caller])
@emits("memory_viewed", memory_id="memory_id")
def get_memory(memory_id: UUID) -> dict[str, UUID]:
    return {"id": memory_id}


@app.post("/memories/{memory_id}/reactions", status_code=201, dependencies=[Caller])
async def react(memory_id: UUID, kind: str = "heart") -> dict[str, UUID]:
    reaction_id = uuid.uuid4()
    await log_reaction_created(memory_id=memory_id, reaction_id=reaction_id, reaction_type=kind)
    return {"id": reaction_id}


@app.post("/memories/{memory_id}/comments", status_code=201, dependencies=[Caller])
@emits("comment_created", memory_id="memory_id", comment_id="result.id", length=lambda a, _: len(a["text"]))
def comment(memory_id: UUID, text: str) -> dict[str, UUID]:
    return {"id": uuid.uuid4()}


@app.get("/feed", dependencies=[Caller])
async def feed(page: int = 1) -> list[UUID]:
    with analytics.timer("feed_query_ms"):
        memories = [uuid.uuid4() for _ in range(3)]
    await log_feed_viewed(page=page, memory_count=len(memories))
    await log_feed_interaction(interaction_type="open", metadata={"page": page})
    await analytics.record_gauge(metric_name="feed_length", value=len(memories))
    return memories


@app.post("/invites", status_code=201, dependencies=[Caller])
@emits("invite_created", invite_id="result.id", invited_role="role")
async def invite(role: str = "grandparent") -> dict[str, UUID]:
    await analytics.emit_event(event_type="invite_mail_queued", metadata={"email_token": "not for the spool"})
    return {"id": uuid.uuid4()}


@app.get("/broken", dependencies=[Caller])
async def broken() -> None:
    raise LookupError("a bug in the application")


@app.get("/missing", dependencies=[Caller])
async def missing() -> None:
    raise HTTPException(404)
