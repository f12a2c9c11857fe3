"""A dropped line is counted by cause and name, logged, included in the final summary and reported by a metric."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest

from spool import Emitter
from spool.drops import MAX_NAMES, OTHER
from spool.metrics import DROPPED_METRIC
from spool.testing import record
from tests.emit.lines import emit, lines
from tests.processes import environment, eventually


def reported(directory: Path) -> Counter[tuple[str, str]]:
    """Return the drops reported by metrics, by cause and name, which are their only labels."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines(directory):
        if line.get("metric_name") == DROPPED_METRIC:
            assert line["labels"].keys() == {"cause", "name"} and line["metric_type"] == "counter"
            assert uuid.UUID(line["event_id"]).version == 7
            found[line["labels"]["cause"], line["labels"]["name"]] += line["value"]
    return found


def drop_some(emitter: Emitter) -> dict[tuple[str, str], int]:
    """Drop lines in every possible way; return the expected counts."""
    user = uuid.uuid4()
    for _ in range(2):
        emitter.emit_event(event_type="seen", user_id="nobody", family_unit_id=user)
    emitter.emit_event(event_type="seen")
    emitter.emit_event(event_type="Not Valid", user_id=user, family_unit_id=user)
    emitter.emit_event(event_type="large", user_id=user, family_unit_id=user, metadata={"a": "x" * (2 << 20)})
    emitter.increment_counter(metric_name="hits", value=-1)
    emitter.record_gauge(metric_name="a b", value=1)
    emitter.record_metric(metric_name="size", metric_type="size", value=1)  # type: ignore[arg-type]  # on purpose
    return {
        ("invalid_uuid", "seen"): 2, ("missing", "seen"): 1, ("invalid_name", OTHER): 2, ("oversize", "large"): 1,
        ("invalid_value", "hits"): 1, ("invalid_type", "size"): 1,
    }  # fmt: skip


def test_every_drop_is_counted_and_reported_by_cause_and_name(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    expected = drop_some(emitter)
    assert emitter.stats().dropped_by_name == expected
    assert sum(emitter.stats().dropped.values()) == sum(expected.values())
    emitter.close()
    assert reported(tmp_path) == expected


def test_drops_are_reported_although_nothing_was_ever_kept(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path, max_age=0.1)
    expected = drop_some(emitter)
    eventually(lambda: reported(tmp_path) == expected)


def test_a_hundred_names_are_counted_and_the_rest_is_other(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    for number in range(MAX_NAMES + 50):
        for _ in range(2):
            emitter.emit_event(event_type=f"event_{number}")
            emitter.increment_counter(metric_name="event_0", value=-1)
    counts = emitter.stats().dropped_by_name
    emitter.close()
    assert counts["missing", OTHER] == 100 and counts["missing", "event_99"] == 2
    assert counts["invalid_value", "event_0"] == 300
    assert len({name for _, name in counts}) == MAX_NAMES + 1
    assert reported(tmp_path) == counts


def test_the_log_has_one_line_per_cause_and_name_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    emitter = Emitter(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            drop_some(emitter)
        eventually(lambda: len([each for each in caplog.records if "dropped" in each.message]) >= 6)
        emitter.close()
    messages = [each.message for each in caplog.records if "analytics line dropped" in each.message]
    assert len(messages) == 6
    assert any(
        message.startswith('analytics line dropped (missing) of "seen": user_id is missing')
        for message in messages
    )


def test_what_is_recorded_in_a_test_is_not_reported_to_the_spool(tmp_path: Path) -> None:
    emitter = Emitter(tmp_path)
    with record(emitter, strict=False) as recorder:
        drop_some(emitter)
        assert not recorder.of(DROPPED_METRIC)
    assert emitter.stats().dropped_by_name[("missing", "seen")] == 1
    emit(emitter)
    emitter.close()
    assert not reported(tmp_path)


CONFIGURATIONS = {
    "none": "",
    "django": "{'version': 1, 'disable_existing_loggers': False, 'handlers': {'console': {'class': 'logging.StreamHandler'}}, 'loggers': {'django': {'handlers': ['console'], 'level': 'INFO'}}}",
    "existing loggers disabled": "{'version': 1, 'handlers': {'console': {'class': 'logging.StreamHandler'}}, 'loggers': {'django': {'handlers': ['console'], 'level': 'INFO'}}}",
    "existing loggers disabled, root": "{'version': 1, 'handlers': {'console': {'class': 'logging.StreamHandler'}}, 'root': {'handlers': ['console'], 'level': 'WARNING'}}",
}  # fmt: skip
DJANGO = """
import django, sys
from django.conf import settings
from spool import Emitter
import spool.emitter  # the logger exists before Django configures logging
settings.configure(**({"LOGGING": eval(sys.argv[2])} if sys.argv[2] else {}))
django.setup()
import spool
spool.get_emitter().emit_event(event_type="seen", user_id="nobody")
spool.get_emitter().increment_counter(metric_name="hits", value=-1)
"""


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_drops_are_logged_and_summed_up_under_djangos_logging(tmp_path: Path, configuration: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DJANGO, "", CONFIGURATIONS[configuration]],
        env=environment(SPOOL_DIR=str(tmp_path)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stderr.count('analytics line dropped (invalid_uuid) of "seen"') == 1, ended.stderr
    assert ended.stderr.count('analytics line dropped (invalid_value) of "hits"') == 1, ended.stderr
    summary = "analytics lines dropped by this process: 2 (invalid_uuid seen 1, invalid_value hits 1)"
    assert ended.stderr.count(summary) == 1, ended.stderr


def test_a_level_silences_the_package(tmp_path: Path) -> None:
    code = (
        "import logging; logging.getLogger('spool').setLevel(logging.CRITICAL); import spool; "
        "spool.get_emitter().emit_event(event_type='seen')"
    )
    variables = environment(SPOOL_DIR=str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""


def test_a_wrong_setting_counts_by_name_after_its_one_warning(tmp_path: Path) -> None:
    code = (
        "import spool; spool.get_emitter().emit_event(event_type='seen'); print(spool.get_emitter().stats())"
    )
    variables = environment(SPOOL_DIR=str(tmp_path), SPOOL_MAX_AGE="soon")
    ended = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    assert "dropped_by_name={('settings', 'seen'): 1}" in ended.stdout
    assert ended.stderr.count("\n") == 1 and "cannot emit analytics" in ended.stderr
    assert not os.listdir(tmp_path)
