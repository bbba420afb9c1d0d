"""What the programs of the examples import of the package is there: no other test runs them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.relative_to(ROOT) for path in ROOT.glob("examples/**/*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_names_that_a_program_imports_exist(program: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse((ROOT / program).read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("megavlm"):
            continue
        names = dir(importlib.import_module(node.module))
        for name in (alias.name for alias in node.names):
            inner = f"{node.module}.{name}"
            if name not in names and importlib.util.find_spec(inner) is None:
                missing.append(inner)
    assert not missing
