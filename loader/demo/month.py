"""Synthetic history of a family photo application, as lines that `loader backfill` loads.

Families in six time zones register over time, use the application in the morning, at noon and mostly in the
evening of their zone, more at weekends, and leave after a while. During an outage of three hours there are no
events, and requests fail. The same seed and time yield the same lines.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import accumulate
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson

DAYS: Final = 60
"""Days of history: unusual hours are found by comparison with the preceding 7 weeks."""
REQUEST_DAYS: Final = 5
"""Days with request metrics, which take twice as many lines as events."""
FAMILIES: Final = 500
OUTAGE: Final = timedelta(hours=3)
_OUTAGE_BEGAN: Final = timedelta(days=3)
_ZONES: Final = {
    "America/New_York": 34, "America/Los_Angeles": 22, "Europe/Berlin": 22, "Asia/Kolkata": 10,
    "Australia/Sydney": 6, "America/Sao_Paulo": 6,
}  # fmt: skip
_WEEK: Final = (1.0, 0.95, 0.95, 1.0, 1.1, 1.35, 1.4)
"""Usage by day of the week, from Monday."""
_HOURS: Final = ((7.8, 1.0, 20), (12.6, 1.1, 20), (20.2, 1.7, 60))
"""Start times of sessions: mean and deviation in hours of local time, and weight."""
_ROLES: Final = ("parent", "parent", "grandparent", "child", "child")
_BEFORE: Final = 0.3
"""Share of the families that registered before the history begins."""

_ENDPOINTS: Final = {
    "feed_viewed": ("GET", "/feed", 3.6), "memory_viewed": ("GET", "/memories/{memory_id}", 2.9),
    "memory_posted": ("POST", "/memories", 4.4), "user_logged_in": ("POST", "/login", 4.9),
    "reaction_created": ("POST", "/memories/{memory_id}/reactions", 2.5),
    "comment_created": ("POST", "/memories/{memory_id}/comments", 2.7),
    "invite_created": ("POST", "/invites", 3.0), "pet_created": ("POST", "/pets", 2.8),
}  # fmt: skip
"""The request behind an event, and the logarithm of its median duration in milliseconds."""
_WEIGHTS: Final = {
    "memory_viewed": 440, "feed_viewed": 210, "reaction_created": 160, "comment_created": 75,
    "memory_posted": 50, "user_logged_out": 12, "reaction_deleted": 10, "memory_updated": 8,
    "invite_created": 8, "invite_accepted": 6, "comment_updated": 5, "pet_created": 4,
    "comment_deleted": 3, "memory_deleted": 3, "child_provisioned": 3,
}  # fmt: skip
_KINDS: Final = tuple(_WEIGHTS)
_CUMULATED: Final = tuple(accumulate(_WEIGHTS.values()))


@dataclass(frozen=True)
class _User:
    user: UUID
    family: UUID
    role: str
    zone: ZoneInfo
    first: date
    last: date
    rate: float
    """Sessions per day."""
    new: bool
    """Whether the user registers on the first day."""


def lines(until: datetime, days: int = DAYS, families: int = FAMILIES, seed: int = 1) -> Iterator[bytes]:
    """Yield the lines of the days before `until`, in order of days."""
    chance = random.Random(seed)
    start = (until - timedelta(days=days)).astimezone(UTC).date()
    down = outage(until)
    users = list(_users(chance, start, days, families))
    late: list[tuple[datetime, int, dict[str, Any]]] = []
    for number in range(days + 1):
        day = start + timedelta(days=number)
        for count, record in enumerate(_day(chance, users, day, until, down)):
            heapq.heappush(late, (record["timestamp"], (number << 32) + count, record))
        ended = datetime.combine(day, time(), UTC)  # sessions of the previous day extend into this one
        while late and late[0][0] < ended:
            yield orjson.dumps(heapq.heappop(late)[2]) + b"\n"
    while late:
        yield orjson.dumps(heapq.heappop(late)[2]) + b"\n"


def outage(until: datetime) -> tuple[datetime, datetime]:
    """Return the time of the outage: from 19:00 in New York, where most users are."""
    day = (until - _OUTAGE_BEGAN).astimezone(ZoneInfo("America/New_York")).date()
    began = datetime.combine(day, time(19), ZoneInfo("America/New_York")).astimezone(UTC)
    return began, began + OUTAGE


def _users(chance: random.Random, start: date, days: int, families: int) -> Iterator[_User]:
    for _ in range(families):
        before = chance.random() < _BEFORE
        born = start + timedelta(days=-chance.randrange(1, 200) if before else chance.randrange(days))
        family, zone = _uuid(chance), ZoneInfo(chance.choices([*_ZONES], [*_ZONES.values()])[0])
        for member in range(chance.randint(1, 5)):
            joined = born + timedelta(days=chance.randrange(20) if member else 0)
            stays = chance.randint(1, 3) if chance.random() < 0.25 else chance.expovariate(1 / 160)
            rate = min(chance.lognormvariate(-1.55, 1.1), 4.0)
            yield _User(
                _uuid(chance), family, _ROLES[member], zone, joined, joined + timedelta(days=stays), rate,
                joined >= start,
            )  # fmt: skip


def _day(
    chance: random.Random, users: list[_User], day: date, until: datetime, down: tuple[datetime, datetime]
) -> Iterator[dict[str, Any]]:
    for user in users:
        if not user.first <= day <= user.last:
            continue
        sessions = _poisson(chance, user.rate * _WEEK[day.weekday()])
        joins = user.new and day == user.first
        for number in range(max(sessions, 1 if joins else 0)):
            yield from _session(chance, user, day, until, down, registers=joins and number == 0)


def _session(
    chance: random.Random, user: _User, day: date, until: datetime, down: tuple[datetime, datetime],
    *, registers: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    mean, deviation, _ = chance.choices(_HOURS, [weight for *_, weight in _HOURS])[0]
    hour = chance.gauss(mean, deviation) % 24
    moment = (datetime.combine(day, time(), user.zone) + timedelta(hours=hour)).astimezone(UTC)
    session, family = str(_uuid(chance)), user.family.int
    length = 1 + int(math.log(1 - chance.random()) / math.log(1 - 1 / 9))
    kinds = chance.choices(_KINDS, cum_weights=_CUMULATED, k=length)
    kinds[:0] = ["user_registered" if registers else "user_logged_in", "feed_viewed"]
    with_requests = until - moment < timedelta(days=REQUEST_DAYS)
    for kind in kinds:
        if moment >= until:
            return
        is_down = down[0] <= moment < down[1]
        if with_requests and kind in _ENDPOINTS:
            yield from _request(chance, kind, moment, is_down=is_down)
        if is_down:
            return  # the user leaves
        yield {
            "event_id": str(_uuid7(chance, moment)), "event_type": kind, "timestamp": moment,
            "user_id": str(user.user), "family_unit_id": str(user.family), "session_id": session,
            "metadata": _metadata(chance, kind, family) | {"role": user.role},
        }  # fmt: skip
        moment += timedelta(seconds=round(chance.lognormvariate(3.1, 1.0), 3))


def _metadata(chance: random.Random, kind: str, family: int) -> dict[str, Any]:
    if kind in ("user_registered", "user_logged_in"):
        return {"method": chance.choice(("password", "password", "apple", "google"))}
    if kind == "feed_viewed":
        return {"page": 1 + int(chance.expovariate(1)), "memory_count": 20}
    if kind.startswith(("memory_", "reaction_", "comment_")):
        memory = UUID(int=(family & ~0xFFFF) | min(int(chance.paretovariate(1.1)), 300))
        found: dict[str, Any] = {"memory_id": str(memory)}
        if kind == "memory_viewed":
            found["duration_ms"] = int(chance.lognormvariate(8, 1))
            found["source"] = chance.choice(("feed", "feed", "feed", "notification", "search"))
        return found
    return {}


def _request(
    chance: random.Random, kind: str, moment: datetime, *, is_down: bool
) -> Iterator[dict[str, Any]]:
    method, endpoint, size = _ENDPOINTS[kind]
    fails = is_down or chance.random() < 0.003
    status = "503" if is_down else "500" if fails else "201" if method == "POST" else "200"
    slow = 9.0 if chance.random() < 0.01 else 1.0
    labels = {"endpoint": endpoint, "method": method, "status": status}
    values = [("api_request_count", "counter", 1.0)]
    values += [("api_request_duration_ms", "timer", round(chance.lognormvariate(size, 0.55) * slow, 3))]
    values += [("api_request_error_count", "counter", 1.0)] if fails else []
    for name, metric_type, value in values:
        yield {
            "event_id": str(_uuid7(chance, moment)), "metric_name": name, "metric_type": metric_type,
            "value": value, "labels": labels, "timestamp": moment,
        }  # fmt: skip


def _poisson(chance: random.Random, mean: float) -> int:
    """Return a Poisson-distributed number, by Knuth's method for small means."""
    limit, product, count = math.exp(-mean), chance.random(), 0
    while product > limit:
        product *= chance.random()
        count += 1
    return count


def _uuid(chance: random.Random) -> UUID:
    return UUID(int=chance.getrandbits(128), version=4)


def _uuid7(chance: random.Random, moment: datetime) -> UUID:
    """Return a UUIDv7 (RFC 9562): 48 bits of milliseconds, version, variant, random bits."""
    milliseconds = int(moment.timestamp() * 1000)
    tail = 0x7 << 76 | chance.getrandbits(12) << 64 | 0x2 << 62 | chance.getrandbits(62)
    return UUID(int=milliseconds << 80 | tail)
