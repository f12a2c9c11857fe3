"""The imports of an application that only emits; pyproject.toml has the contracts between packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = (
    "spool",
    "spool.context",
    "spool.events",
    "spool.metrics",
    "spool.asgi",
    "spool.wsgi",
    "spool.service",
    "spool.hook",
)


@pytest.mark.parametrize("module", MODULES)
def test_importing_the_public_face_loads_orjson_and_nothing_else(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    others = {name for name in loaded if not name.startswith("_") and name not in sys.stdlib_module_names}
    assert {name for name in others if "editable" not in name} <= {"spool", "orjson"}


def test_a_process_that_only_emits_does_not_import_asyncio() -> None:
    code = "import sys, spool.service, spool.events; assert 'asyncio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
