"""The wheel has everything needed: the schema, the types, and for an emitter orjson as its only dependency."""

from __future__ import annotations

import zipfile
from pathlib import Path

import spool
from tests.release import ROOT


def test_the_wheel_has_the_schema_the_types_and_the_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {
            "spool/py.typed",
            "loader/py.typed",
            "loader/schema.sql",
            "loader/demo/application.py",
            "loader/role.sql",
            "loader/see/page.html",
            "loader/see/page.css",
            "spool/README.md",
            "loader/README.md",
            "loader/see/README.md",
            "loader/deploy/grafana/dashboards/analytics.json",
            "loader/deploy/grafana/provisioning/dashboards/analytics.yaml",
            "loader/deploy/grafana/provisioning/datasources/analytics.yaml",
            "loader/deploy/prometheus/analytics.rules.yaml",
        } <= set(names)
        units = {f"share/analytics-spool/systemd/{path.name}" for path in (ROOT / "systemd").iterdir()}
        assert units <= {name.partition(".data/data/")[2] for name in names}
        assert archive.read("loader/schema.sql") == (ROOT / "schema.sql").read_bytes()
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
        (script,) = (name for name in names if name.endswith(".data/scripts/analytics-loader"))
        assert archive.getinfo(script).external_attr >> 16 & 0o111, "it may not be executed"
        assert archive.read(script).startswith(b"#!python\n")  # replaced by installers
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "loader = loader.__main__:main" in scripts
    assert "[pytest11]\nspool.testing = spool.testing" in scripts
    fields = metadata.partition("\n\n")[0]
    assert f"\nVersion: {spool.__version__}\n" in fields
    for field in (
        "License-Expression: Apache-2.0",
        "Author: ",
        "Project-URL: Changelog, https://",
        "Classifier: ",
    ):
        assert f"\n{field}" in fields
    needed = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert [line.split()[1].partition(">")[0] for line in needed] == ["orjson"]
