"""The dashboard and the alert rules: every panel's SQL runs, and they refer only to what exists."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from loader.service.health import Health
from loader.service.metrics import _LoaderCollector
from tests.see.answers.conftest import HOSTILE, READER, World
from tests.see.answers.grafana import expand

DEPLOY = files("loader") / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/analytics.json").read_text("utf-8"))
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
DATASOURCE = {"type": "grafana-postgresql-datasource", "uid": "${datasource}"}
CHOSEN = {
    "tz": "America/New_York", "bucket": "day", "fine": "hour",
    "steps": "feed_viewed,memory_viewed,reaction_created",
    "types": ["memory_viewed", "feed_viewed", HOSTILE],
}  # fmt: skip


def run(world: World, statement: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Run a panel's SQL as Grafana does: as a reader, with the default session time zone."""
    until = datetime.now(UTC)
    sql = expand(statement, until - timedelta(days=30), until, "6h", CHOSEN)
    with psycopg.connect(make_conninfo(world.dsn, user=READER)) as connection:
        cursor = connection.execute(sql.encode())
        assert cursor.description is not None
        return [column.name for column in cursor.description], cursor.fetchall()


@pytest.mark.parametrize("title", PANELS)
def test_the_sql_of_every_panel_runs_and_has_the_columns_that_the_panel_needs(
    world: World, title: str
) -> None:
    panel = PANELS[title]
    for target in panel["targets"]:
        columns, rows = run(world, target["rawSql"])
        assert rows and len(set(columns)) == len(columns)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in columns
        if target["format"] == "time_series":
            times = [row[columns.index("time")] for row in rows]
            assert times == sorted(times), "Grafana needs times in ascending order"
            assert all((isinstance(time, datetime) and time.tzinfo) or time == float(time) for time in times)
            values = [name for name in columns if name not in ("time", "metric")]
            assert all(float(row[columns.index(name)] or 0) >= 0 for row in rows for name in values)


def test_the_queries_of_variables_run(world: World) -> None:
    queries = [variable["query"] for variable in VARIABLES.values() if variable["type"] == "query"]
    assert queries
    for query in queries:
        _, rows = run(world, query)
        assert ("memory_viewed",) in rows


def test_every_target_uses_the_datasource_variable() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == DATASOURCE["type"]
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
    assert "__inputs" not in DASHBOARD and "${DS_" not in json.dumps(DASHBOARD), (
        "provisioning does not fill these"
    )


def test_ids_are_unique_and_panels_neither_overlap_nor_leave_the_grid() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) == len(PANELS)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, (a, b)


def test_every_variable_in_a_query_exists_and_every_one_is_used() -> None:
    queries = " ".join(target["rawSql"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    used = set(re.findall(r"\$\{?(?!__)(\w+)", queries))
    assert used == set(VARIABLES) - {"datasource"}


@pytest.mark.parametrize(
    "statement",
    ["SELECT $__unknown(a)", "SELECT '$nothing'", "SELECT $__timeGroup(date_trunc('day', t), '1h')"],
)
def test_what_grafana_would_refuse_is_refused(statement: str) -> None:
    with pytest.raises(ValueError, match=r"left over|unknown|not an interval"):
        expand(statement, datetime.now(UTC), datetime.now(UTC), "1m", {})


def test_every_alert_is_about_a_metric_of_the_loader(tmp_path: Path) -> None:
    rules = (DEPLOY / "prometheus/analytics.rules.yaml").read_text("utf-8")
    collected = _LoaderCollector(tmp_path, Health()).collect()
    names = {sample.name for family in collected for sample in family.samples} | {
        f"{family.name}_bucket"
        for family in _LoaderCollector(tmp_path, Health()).collect()
        if family.type == "histogram"
    }
    expressions = re.findall(r"^ +expr: (.*)$", rules, re.MULTILINE)
    assert len(expressions) == len(re.findall("- alert:", rules)) >= 6
    for expression in expressions:
        for name in re.findall(r"\banalytics_\w+", expression.replace('table="analytics_events"', "")):
            assert name in names, f"{name} is not a metric of the loader"
    assert (
        rules.count("summary:") == rules.count("description:") == rules.count("severity:") == len(expressions)
    )


def test_the_rules_and_the_provisioning_are_yaml() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    for name in (
        "prometheus/analytics.rules.yaml", "grafana/provisioning/datasources/analytics.yaml",
        "grafana/provisioning/dashboards/analytics.yaml",
    ):  # fmt: skip
        assert yaml.safe_load((DEPLOY / name).read_text("utf-8"))
