"""`loader ask QUESTION`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

import click

from loader import settings
from loader.cli import answers, terminal
from loader.errors import UsageError
from loader.see.catalogue import MOST_STEPS
from loader.see.period import duration, period

if TYPE_CHECKING:
    from rich.table import Table

Function = TypeVar("Function", bound=Callable[..., None])
_MOST_BUCKETS: Final = 5000
_LENGTHS: Final = {
    "hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(days=7),
    "month": timedelta(days=28),
}  # fmt: skip


@click.group("ask")
def command() -> None:
    """Answer a question about the loaded data.

    Dates, and ages in days or weeks, start at local midnight in the time zone; ages in hours are exact.

    \b
    Examples:
      loader ask active --since 28d --tz America/New_York
      loader ask funnel feed_viewed memory_viewed reaction_created --within 1d
      loader ask requests --since 24h
    """


def _bucket(*buckets: str, default: str) -> Callable[[Function], Function]:
    return click.option(
        "--bucket", type=click.Choice(buckets), default=default, show_default=True, help="Length of a bucket."
    )


_who = click.option(
    "--who", type=click.Choice(("user", "family")), default="user", show_default=True, help="Whom to count."
)
_limit = click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=20,
    show_default=True,
    help="Maximum number of rows.",
)
_types = click.argument("types", nargs=-1, metavar="[EVENT_TYPE]...")


def _answer(
    name: str, given: dict[str, Any], show: Callable[..., Table], *, also: Sequence[str] = (),
    named: Sequence[str] = (), note: str = "", **parameters: Any,
) -> None:  # fmt: skip
    """Check the range, query, and print the answer in the chosen format.

    `also` are additional questions needed only for the table; `named` are event types whose spelling is
    checked.
    """
    from loader.see import questions, tables

    if given["as_json"] and given["as_csv"]:
        raise UsageError("--json and --csv are mutually exclusive: give only one of them")
    when = period(given["since"], given["until"], given["tz"])
    bucket = parameters.get("bucket")
    if bucket and (when.until - when.since) / _LENGTHS[bucket] > _MOST_BUCKETS:
        raise UsageError(f"the range has more than {_MOST_BUCKETS} {bucket}s: choose a later --since")
    also = () if given["as_json"] or given["as_csv"] else also
    with questions.reading(settings.database_dsn(given["dsn"])) as connection:
        found = [questions.ask(connection, each, when, **parameters) for each in (name, *also)]
        unknown = list(questions.unknown_types(connection, named))
    if given["as_json"]:
        answers.print_json(found[0])
    elif given["as_csv"]:
        answers.print_csv(found[0])
    else:
        answers.print_table(show(*found))
        for text in (*tables.notes(found[0]), *filter(None, [note])):
            answers.print_note(text)
    for sentence in unknown:
        terminal.warn(sentence)


@command.command("trend")
@_types
@_bucket("hour", "day", "week", "month", default="day")
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    help="Number of most frequent types to list; the others are added up.",
)
@answers.question("28d")
def trend(types: tuple[str, ...], bucket: str, top: int | None, **given: Any) -> None:
    """Count events by type over time.

    \b
    Examples:
      loader ask trend
      loader ask trend memory_viewed feed_viewed --bucket week --since 12w
    """
    from loader.see import tables

    _answer("trend", given, tables.trend, named=types, types=list(types) or None, bucket=bucket, top=top)


@command.command("active")
@_types
@_who
@answers.question("28d")
def active(types: tuple[str, ...], who: str, **given: Any) -> None:
    """Count active users of 1, 7 and 28 days, each user once.

    1/28 is the share of users active within 28 days who were active on that day.

    \b
    Examples:
      loader ask active --since 28d --tz America/New_York
      loader ask active memory_viewed --who family
    """
    from loader.see import tables

    _answer("active", given, tables.active, named=types, types=list(types) or None, who=who, bucket="day")


@command.command("lifecycle")
@_types
@_bucket("day", "week", "month", default="week")
@_who
@answers.question("12w")
def lifecycle(types: tuple[str, ...], bucket: str, who: str, **given: Any) -> None:
    """Count new, retained, resurrected and dormant users.

    New: first event ever. Retained: also active in the previous bucket. Resurrected: active earlier, but not
    in the previous bucket. Dormant: active in the previous bucket, but not in this one.

    \b
    Examples:
      loader ask lifecycle
      loader ask lifecycle --bucket day --since 14d --who family
    """
    from loader.see import tables

    _answer(
        "lifecycle", given, tables.lifecycle, named=types, types=list(types) or None, bucket=bucket, who=who
    )


@command.command("retention")
@click.option(
    "--starting", multiple=True, metavar="EVENT_TYPE", help="Event that makes a user new; default: any."
)
@click.option(
    "--coming", multiple=True, metavar="EVENT_TYPE", help="Event that counts as returning; default: any."
)
@_bucket("day", "week", "month", default="week")
@click.option(
    "--periods",
    type=click.IntRange(1, 100),
    default=8,
    show_default=True,
    help="Number of buckets after the first.",
)
@click.option("--unbounded", is_flag=True, help="Count returns in the n-th bucket or later.")
@_who
@answers.question("8w")
def retention(
    starting: tuple[str, ...], coming: tuple[str, ...], bucket: str, periods: int, unbounded: bool, who: str,
    **given: Any,
) -> None:  # fmt: skip
    """Show how many of a bucket's new users returned.

    \b
    Examples:
      loader ask retention
      loader ask retention --starting user_registered --coming memory_viewed --bucket day --periods 7
    """
    from loader.see import tables

    _answer(
        "retention", given, lambda answer: tables.retention(answer, answers.width()),
        named=(*starting, *coming),
        starting=list(starting) or None, coming=list(coming) or None, bucket=bucket, periods=periods,
        unbounded=unbounded, who=who,
    )  # fmt: skip


@command.command("funnel")
@click.argument("steps", nargs=-1, required=True, metavar="STEP...")
@click.option(
    "--within",
    default="7d",
    show_default=True,
    metavar="LENGTH",
    help="Maximum time from the first to the last step.",
)
@click.option("--strict", is_flag=True, help="Allow no other event between two steps.")
@click.option(
    "--who",
    type=click.Choice(("user", "family", "session")),
    default="user",
    show_default=True,
    help="Whom to count.",
)
@click.option("--breakdown", metavar="KEY", help="Group by this metadata key of the first step.")
@answers.question("28d")
def funnel(
    steps: tuple[str, ...], within: str, strict: bool, who: str, breakdown: str | None, **given: Any
) -> None:
    """Show how many users took each step, in order.

    The first step must be in the range; later steps may be after it, up to --within.

    \b
    Examples:
      loader ask funnel feed_viewed memory_viewed reaction_created --within 1d
      loader ask funnel memory_viewed reaction_created --breakdown source --who session
    """
    from loader.see import tables

    if len(steps) > MOST_STEPS:
        raise UsageError(f"a funnel has at most {MOST_STEPS} steps, not {len(steps)}")
    _answer(
        "funnel", given, lambda answer: tables.funnel(answer, broken_down=breakdown is not None), named=steps,
        steps=list(steps), within=duration(within, "--within"), strict=strict, who=who, breakdown=breakdown,
    )  # fmt: skip


@command.command("sessions")
@click.option(
    "--gap", metavar="LENGTH", help="End a session after this time without events; default: by session_id."
)
@_bucket("day", "week", "month", default="day")
@answers.question("28d")
def sessions(gap: str | None, bucket: str, **given: Any) -> None:
    """Count sessions by start, with their durations.

    \b
    Examples:
      loader ask sessions
      loader ask sessions --gap 30m --bucket week
    """
    from loader.see import tables

    if gap is None:
        _answer("sessions", given, tables.sessions, bucket=bucket)
    else:
        _answer("sessions_by_gap", given, tables.sessions, bucket=bucket, gap=duration(gap, "--gap"))


@command.command("requests")
@click.option(
    "--bucket",
    type=click.Choice(("hour", "day", "week", "month")),
    help="With --json or --csv: a row per bucket.",
)
@answers.question("24h")
def requests(bucket: str | None, **given: Any) -> None:
    """Show requests, failures and durations by endpoint.

    Statuses of 500 and above count as failures; durations are in milliseconds.

    \b
    Examples:
      loader ask requests --since 24h
      loader ask requests --since 7d --bucket hour --csv
    """
    from loader.see import tables

    if bucket and (given["as_json"] or given["as_csv"]):
        _answer("requests_by", given, tables.requests, bucket=bucket)
        return
    days = period(given["since"], given["until"], given["tz"])
    finer = bucket or ("hour" if days.until - days.since <= timedelta(days=3) else "day")
    _answer("requests", given, tables.requests, also=["requests_by"], bucket=finer)


@command.command("anomalies")
@answers.question("7d")
def anomalies(**given: Any) -> None:
    """List hours with far more or fewer events than expected.

    \b
    Examples:
      loader ask anomalies --since 7d --tz America/New_York
    """
    from loader.see import questions, tables

    _answer("anomalies", given, tables.anomalies, note=questions.WHAT_ANOMALIES_MISS)


@command.command("interactions")
@click.option(
    "--half-life",
    default="30d",
    show_default=True,
    metavar="LENGTH",
    help="Age at which an interaction counts half.",
)
@_limit
@answers.question("30d")
def interactions(half_life: str, limit: int, **given: Any) -> None:
    """List pairs of user and memory by their weighted interactions.

    A view weighs 1, a reaction 3, a comment 5.

    \b
    Examples:
      loader ask interactions --limit 10
    """
    from loader.see import tables

    _answer(
        "interactions", given, tables.interactions, half_life=duration(half_life, "--half-life"), limit=limit
    )


@command.command("user")
@click.argument("user", type=click.UUID, metavar="UUID")
@_limit
@answers.question("52w")
def user(user: UUID, limit: int, **given: Any) -> None:
    """Show the latest events of one user, oldest first.

    \b
    Examples:
      loader ask user 0190163d-8694-739b-aea5-966c26f8ad91
    """
    from loader.see import tables

    _answer("user", given, tables.timeline, user=user, limit=limit)
