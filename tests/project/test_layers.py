"""Who may import whom, and what an application that only emits has to load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [path for package in ("spool", "loader") for path in sorted((ROOT / package).glob("*.py"))]
SPOOL_LEAVES = {"spool.record", "spool.segment", "spool.ids"}


def imported(path: Path) -> set[str]:
    """Every module of ours that a room imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("spool", "loader"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return {name for name in found if name.partition(".")[0] in ("spool", "loader")}


def of(room: str) -> set[str]:
    return imported(ROOT / f"{room.replace('.', '/')}.py")


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_room_knows_only_its_neighbours(path: Path) -> None:
    names = imported(path)
    if path.parent.name == "spool":
        assert not {name for name in names if name.startswith("loader")}
    elif path.stem != "example":  # which uses the public face, as the application it is
        assert {name for name in names if name.startswith("spool")} <= SPOOL_LEAVES


def test_the_contracts_and_the_single_purpose_rooms_stay_apart() -> None:
    assert of("spool.segment") <= {"spool.kernel"} and of("spool.ids") <= {"spool.fork"}
    assert "spool.segment" not in of("spool.record")
    assert not {"loader.database", "loader.load"} & of("loader.decode")
    assert not {"loader.database", "loader.load", "loader.decode"} & of("loader.watch")
    assert "loader.chunk" not in of("loader.database")


MODULES = ("spool", "spool.context", "spool.events", "spool.metrics", "spool.asgi", "spool.wsgi")


@pytest.mark.parametrize("module", MODULES)
def test_importing_the_public_face_loads_orjson_and_nothing_else(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    others = {name for name in loaded if not name.startswith("_") and name not in sys.stdlib_module_names}
    assert {name for name in others if "editable" not in name} <= {"spool", "orjson"}
