"""Each value that an application may pass becomes exactly one valid line for the loader, or is refused."""

from __future__ import annotations

import dataclasses
import enum
import gc
import logging
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader.load.decode import Row, decode
from spool import Emitter
from spool.annotations import MetricType
from spool.context import bind
from spool.metrics import DROPPED_METRIC
from spool.record import MEMO_SIZE
from tests.emit.lines import FAMILY, USER
from tests.processes import shown

Kept = Callable[[], list[bytes]]
"""Seals and returns the lines that were written since it was called last."""


@pytest.fixture
def emitter(tmp_path: Path) -> Iterator[Emitter]:
    emitter = Emitter(tmp_path)
    yield emitter
    emitter.close()


@pytest.fixture
def kept(emitter: Emitter) -> Kept:
    def lines() -> list[bytes]:
        assert emitter.seal()
        files = sorted(emitter.settings.directory.glob("*.ndjson"))
        found = [
            line
            for file in files
            for line in file.read_bytes().splitlines(keepends=True)
            if DROPPED_METRIC.encode() not in line
        ]
        for file in files:
            file.unlink()
        return found

    return lines


def only_row(lines: list[bytes]) -> dict[str, Any]:
    """Return the row of the only line, as decoded by the loader."""
    (line,) = lines
    assert isinstance(decode(line), Row), line
    record: dict[str, Any] = orjson.loads(line)
    return record


# ---- metadata and labels ------------------------------------------------------------------------------


class Text(str):
    """A string whose methods pretend that it is a different one."""

    def __str__(self) -> str:
        return 'x"\n'

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("a")

    def encode(self, *_: Any) -> bytes:
        return b'x"\n'


class Number(int):
    def __repr__(self) -> str:
        return "x\n"


class Real(float):
    def __repr__(self) -> str:
        return "x\n"


class Exact(Decimal):
    def __str__(self) -> str:
        return "x\n"


class Identifier(uuid.UUID):
    def __str__(self) -> str:
        return 'x"\n'


class Mapping(dict[str, Any]):
    """A dictionary whose methods hide its contents."""

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def keys(self) -> Any:
        return ()

    def values(self) -> Any:
        return ()


@dataclasses.dataclass
class Data:
    value: Any
    other: int = 1


@dataclasses.dataclass(slots=True)
class Slotted:
    value: Any


class Kind(enum.Enum):
    text = "text"
    nan = math.nan
    nothing = None


class TextKind(enum.StrEnum):
    posted = "memory_posted"


FRAGMENTS = [
    b"1", b"null", b' {"x":\n1}', b"1\r", b"\t[1,\n2]", b"not json", b"", b"1,", b'1,"a":2', b'1}\n{"a":1',
    b"NaN",
    b'"\\u0000"', b'"\\ud800"', b'"\0"', b"\xff", b"1e999", b"9" * 400, b"[" * 2000 + b"]" * 2000,
    b'1,"password":"hunter2"', b'{"password":"hunter2"},"a":1',
]  # fmt: skip
numpy_values: list[Any] = []
try:
    import numpy as np  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    pass
else:
    numpy_values = [np.float64(1.5), np.float64("nan"), np.int64(3), np.array([1, 2])]

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.text(st.characters()) | st.uuids()
    | st.datetimes(timezones=st.none() | st.just(UTC)) | st.dates() | st.times()
    | st.sampled_from([
        *map(orjson.Fragment, FRAGMENTS), *Kind, *TextKind, Text("b"), Number(7), Real(1.5), Real("nan"),
        Exact("1"), Identifier(int=5), b"bytes", object(), {1}, date.max, *numpy_values,
    ])
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["a", "b", "password", "x\n", ""]) | st.text(), inner, max_size=3)
        | st.dictionaries(st.just("a"), inner).map(Mapping)
        | inner.map(Data)
        | inner.map(Slotted)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(["a", "b", "role", "password"]) | st.text(), values, max_size=3)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # one emitter for all examples, so that memos of one would affect the next
@given(objects | objects.map(Mapping) | values, st.booleans())
def test_metadata_and_labels_are_one_valid_line_or_refused(
    emitter: Emitter, kept: Kept, value: Any, bound: bool
) -> None:
    emitter.emit_event(event_type="seen", user_id=USER, family_unit_id=FAMILY, metadata={"a": 1, "b": 2})
    kept()
    event = {"event_type": "odd", "metadata": value}
    if bound:
        with bind(user_id=USER, family_unit_id=FAMILY, role="parent", request_id="r"):
            event_id = emitter.emit_event(**event)
    else:
        event_id = emitter.emit_event(**event, user_id=USER, family_unit_id=FAMILY)
    check(kept(), event_id)
    metric_id = emitter.increment_counter(metric_name="odd", labels=value)
    check(kept(), metric_id)


def check(lines: list[bytes], acknowledged: str | None) -> None:
    if acknowledged is None:
        assert not lines
        return
    record = only_row(lines)
    assert record["event_id"] == acknowledged
    assert b"hunter2" not in lines[0]
    assert len(orjson.dumps(record)) == len(lines[0].rstrip(b"\n"))  # no duplicate key, no spaces


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_fragment_under_a_known_key_is_no_back_door(emitter: Emitter, kept: Kept, fragment: bytes) -> None:
    emitter.emit_event(event_type="odd", user_id=USER, family_unit_id=FAMILY, metadata={"a": 1})
    kept()
    metadata = {"a": orjson.Fragment(fragment)}
    event_id = emitter.emit_event(event_type="odd", user_id=USER, family_unit_id=FAMILY, metadata=metadata)
    check(kept(), event_id)


def test_an_object_that_hides_its_keys_keeps_no_secret_from_redaction(emitter: Emitter, kept: Kept) -> None:
    emitter.emit_event(
        event_type="odd", user_id=USER, family_unit_id=FAMILY, metadata=Mapping(password="hunter2")
    )
    assert only_row(kept())["metadata"] == {"password": "[redacted]"}


@pytest.mark.parametrize(
    "value", [math.nan, Real("inf"), Kind.nan, Data(math.nan), Slotted([Kind.nan]), Mapping(b=math.nan)]
)
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(
    emitter: Emitter, kept: Kept, value: Any
) -> None:
    assert emitter.increment_counter(metric_name="odd", labels={"a": value}) is None
    assert emitter.stats().dropped.keys() <= {"not_finite", "not_json"}
    assert not kept()


# ---- numbers ------------------------------------------------------------------------------------------

COUNTER_OR_GAUGE: list[MetricType] = ["counter", "gauge"]
numbers = (
    st.integers() | st.floats() | st.decimals() | st.integers().map(Number) | st.floats().map(Real) | leaves
    | st.sampled_from([
        Decimal("1E+400"), Decimal("1E-400"), Decimal("-0E+5"), Decimal("sNaN"), Exact("2.50"), 10**400,
        1 << 63, (1 << 64) - 1, -(1 << 63), -0.0,
    ])
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers, st.sampled_from(COUNTER_OR_GAUGE))
def test_a_value_is_written_as_the_number_it_is_or_refused(
    emitter: Emitter, kept: Kept, value: Any, metric_type: MetricType
) -> None:
    metric_id = emitter.record_metric(metric_name="odd", metric_type=metric_type, value=value)
    lines = kept()
    check_number = metric_id is not None
    assert len(lines) == check_number
    if check_number:
        assert only_row(lines)["value"] == float(value) or orjson.loads(lines[0])["value"] == value


# ---- ids and names ------------------------------------------------------------------------------------

CANONICAL = "0190163d-8694-739b-aea5-966c26f8ad91"
NOT_IDS = [
    "", 0, False, b"", 1, True, "1", [], {}, object(), CANONICAL.encode(), f" {CANONICAL} ", "0x" + "9" * 30,
    CANONICAL.replace("-", "", 1), f"{{{CANONICAL}", f"{{{{{CANONICAL}}}}}", f"urn:uuid:{{{CANONICAL}}}",
    "0190163d8694739baea5966c26f8ad9_", "\u0660" * 32, f"{CANONICAL}\n", CANONICAL + "-" * 4,
]  # fmt: skip


class Liar:
    """An object that equals everything and has the hash of the UUID with number 1."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash(1)

    def __str__(self) -> str:
        return CANONICAL


@pytest.mark.parametrize("field", ["user_id", "family_unit_id", "session_id", "event_id"])
@pytest.mark.parametrize("value", [*NOT_IDS, Liar(), Text("nobody")], ids=shown)
def test_what_is_not_an_id_is_refused_whatever_is_bound_or_was_seen(
    emitter: Emitter, kept: Kept, field: str, value: Any
) -> None:
    first: dict[str, Any] = {
        "user_id": uuid.UUID(int=1),
        "family_unit_id": uuid.UUID(int=1),
        "session_id": uuid.UUID(int=1),
    }
    emitter.emit_event(event_type="odd", **first)
    assert len(kept()) == 1
    assert emitter.emit_event(event_type="odd", **{**first, field: value}) is None
    with bind(user_id=USER, family_unit_id=FAMILY, session_id=USER):
        assert emitter.emit_event(event_type="odd", **{field: value}) is None
    assert emitter.stats().dropped == {"invalid_uuid": 2}
    assert not kept()


@pytest.mark.parametrize(
    "value",
    [
        CANONICAL, CANONICAL.upper(), CANONICAL.replace("-", ""), f"{{{CANONICAL}}}", f"urn:uuid:{CANONICAL}",
        uuid.UUID(CANONICAL), Identifier(CANONICAL), Text(CANONICAL),
    ],
    ids=shown,
)  # fmt: skip
def test_an_id_in_any_of_its_forms_is_written_in_the_canonical_one(
    emitter: Emitter, kept: Kept, value: Any
) -> None:
    emitter.emit_event(
        event_type="odd", user_id=value, family_unit_id=value, session_id=value, event_id=value
    )
    row = only_row(kept())
    assert {row[key] for key in ("user_id", "family_unit_id", "session_id", "event_id")} == {CANONICAL}


def test_a_name_is_the_text_of_a_string_and_nothing_that_equals_it(emitter: Emitter, kept: Kept) -> None:
    who: dict[str, Any] = {"user_id": USER, "family_unit_id": FAMILY}
    assert emitter.emit_event(event_type=TextKind.posted, **who)
    assert only_row(kept())["event_type"] == "memory_posted"
    emitter.emit_event(event_type="a", **who)
    emitter.increment_counter(metric_name="a")
    assert len(kept()) == 2
    assert emitter.emit_event(event_type=Text("No Name"), **who) is None
    assert emitter.increment_counter(metric_name=Text("No Name")) is None
    unknown: Any = Text("sum")
    assert emitter.record_metric(metric_name="a", metric_type=unknown, value=1) is None
    assert not kept()


# ---- timestamps ---------------------------------------------------------------------------------------


class Stamp(datetime):
    def isoformat(self, *_: Any) -> str:
        return "x\n"


EAST, WEST = timezone(timedelta(hours=5)), timezone(-timedelta(hours=5))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (Stamp(2026, 1, 20, 12, tzinfo=EAST), "2026-01-20T07:00:00.000000Z"),
        (datetime.min.replace(tzinfo=UTC), "0001-01-01T00:00:00.000000Z"),
        (datetime.max.replace(tzinfo=UTC), "9999-12-31T23:59:59.999999Z"),
        ("2016-12-31t23:59:60.25z", "2017-01-01T00:00:00.250000Z"),
        (datetime.min.replace(tzinfo=EAST), None),
        (datetime.max.replace(tzinfo=WEST), None),
        (datetime(2026, 1, 20), None),
        ("2024-W01-1T12:30:00.123456Z", None),
        (1768910400, None),
    ],
    ids=shown,
)
def test_a_timestamp_is_written_in_utc_within_the_years_1_to_9999(
    emitter: Emitter, kept: Kept, given: Any, written: str | None
) -> None:
    event_id = emitter.emit_event(event_type="odd", user_id=USER, family_unit_id=FAMILY, timestamp=given)
    assert (event_id is None) == (written is None)
    if written is not None:
        assert only_row(kept())["timestamp"] == written
    else:
        assert emitter.stats().dropped == {"invalid_timestamp": 1}


# ---- memory -------------------------------------------------------------------------------------------


class Carrier(str):
    """A string that references a large object, which a memo must not keep alive."""

    load: bytes


def carrier(text: str) -> Carrier:
    made = Carrier(text)
    made.load = bytes(3_000_000)
    return made


LONG = "x" * 3_000_000
CHOSEN: dict[str, Callable[[Emitter, int], object]] = {
    "a key of metadata": lambda e, n: e.emit_event(
        event_type="odd", user_id=USER, family_unit_id=FAMILY, metadata={f"{n}{LONG}": 1}
    ),
    "a label": lambda e, n: e.increment_counter(metric_name="odd", labels={f"{n}{LONG}": 1}),
    "a user's id": lambda e, n: e.emit_event(
        event_type="odd", user_id=carrier(str(uuid.UUID(int=n))), family_unit_id=FAMILY
    ),
    "an event's name": lambda e, n: e.emit_event(
        event_type=carrier(f"n{n}"), user_id=USER, family_unit_id=FAMILY
    ),
    "a metric's name": lambda e, n: e.increment_counter(metric_name=carrier(f"n{n}")),
}


@pytest.mark.parametrize("call", CHOSEN.values(), ids=CHOSEN.keys())
def test_memory_does_not_grow_with_what_clients_choose(
    emitter: Emitter, call: Callable[[Emitter, int], object]
) -> None:
    call(emitter, 0)
    tracemalloc.start()
    try:
        for number in range(1, 30):
            call(emitter, number)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 4_000_000  # the last one, of 90 MB
    finally:
        tracemalloc.stop()


def test_a_full_memo_is_a_few_mebibytes(emitter: Emitter) -> None:
    tracemalloc.start()
    try:
        for number in range(MEMO_SIZE + 10):
            name = f"n{number:099d}"
            emitter.increment_counter(metric_name=name, labels={f"{number:0128d}": 1})
            emitter.emit_event(event_type=name, user_id=uuid.UUID(int=number), family_unit_id=FAMILY)
        assert tracemalloc.get_traced_memory()[0] < 16_000_000
    finally:
        tracemalloc.stop()


# ---- exceptions that are not ours ---------------------------------------------------------------------


class SoftTimeLimit(Exception):
    """An exception like Celery's, which a signal handler raises at an arbitrary instruction."""


@pytest.mark.parametrize(
    "error", [SoftTimeLimit, LookupError, TypeError, TimeoutError, ValueError, RuntimeError]
)
def test_what_a_signal_handler_raises_during_an_emit_reaches_the_application(
    emitter: Emitter, error: type[Exception]
) -> None:
    def handler(*_: object) -> None:
        raise error("time is up")

    def busy() -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:  # values that take the slow path, in which an alarm is most likely
            emitter.emit_event(
                event_type="odd", user_id=uuid.uuid4(), family_unit_id=FAMILY, metadata={"a": {"b": "\n"}}
            )

    emitter.emit_event(event_type="odd", user_id=USER, family_unit_id=FAMILY)
    gc.disable()  # a callback or finalizer that runs in between must not raise
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for delay in range(100):
            with pytest.raises(error, match="time is up"):
                alarmed(busy, 0.0005 + delay * 1e-6)
    finally:
        signal.signal(signal.SIGALRM, previous)
        gc.enable()
    assert "invalid" not in emitter.stats().dropped


def alarmed(work: Callable[[], None], seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


DEEP = """
import logging, sys, uuid
from spool import AnalyticsService, get_emitter
from spool.events import emits, log_pet_created
from spool.metrics import log_feed_interaction

logging.disable()
emitter, user = get_emitter(), uuid.uuid4()
analytics = AnalyticsService(emitter)

def run(coroutine):
    try:
        coroutine.send(None)
    except StopIteration:
        pass

@emits("pet_created", pet_id="pet", user_id="pet", family_unit_id="pet")
def adopt(pet):
    returned.append(1)

@emitter.timer("deep_ms")
def timed():
    returned.append(1)

calls = [
    lambda: emitter.increment_counter(metric_name="deep"),
    lambda: emitter.record_gauge(metric_name="deep", value=-1, labels={"a": {}}),
    lambda: emitter.increment_counter(metric_name="deep", value=object()),
    lambda: run(analytics.increment_counter(metric_name="deep")),
    lambda: run(analytics.emit_event(event_type="deep", user_id=user, family_unit_id=user)),
    lambda: log_pet_created.emit(pet_id=user, user_id=user, family_unit_id=user),
    lambda: run(log_pet_created(pet_id=user, user_id=user, family_unit_id=user)),
]
decorated = [lambda: adopt(user), timed]

def dive(call):
    try:
        dive(call)
    except RecursionError:
        pass
    returned.clear()
    try:
        call()
    except RecursionError as error:
        # A decorated function that Python had no frame for did not run: that error is the application's own.
        if returned or call not in decorated:
            raised.append(error)

def ours(error):
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return "/spool/" in files[-1]

for number, call in enumerate(calls + decorated):
    raised, returned = [], []
    call()
    sys.setrecursionlimit(300)
    dive(call)
    sys.setrecursionlimit(3000)
    inside = [each for each in raised if ours(each)]
    assert not inside, (number, inside)
assert emitter.stats().dropped["recursion"] > 0
"""


@pytest.mark.no_coverage
def test_near_the_recursion_limit_a_call_drops_and_counts(tmp_path: Path) -> None:
    variables = {**os.environ, "SPOOL_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", DEEP], env=variables, check=True, timeout=60)


def test_a_drop_is_quick_although_it_asks_whose_exception_it_is(emitter: Emitter) -> None:
    logging.getLogger("spool").setLevel(logging.CRITICAL)
    try:
        begin = time.perf_counter()
        for _ in range(1000):
            emitter.emit_event(event_type="odd", user_id="nobody", family_unit_id=FAMILY)
        assert time.perf_counter() - begin < 1  # 1 ms each, on any machine
    finally:
        logging.getLogger("spool").setLevel(logging.NOTSET)
