"""On a CPU, Transformer Engine's layers with torch operations in place of its compiled functions
train as local layers do: losses, gradient norms, and weights after two steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.te.numbers import SETTINGS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``numbers.py`` prints, from a process of its own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile() as answer:
        number = answer.fileno()
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-O", "-m", "tests.te.numbers", str(number)],
            env=environment,
            cwd=ROOT,
            pass_fds=[number],
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == 0, process.stderr[-4000:]
        answer.seek(0)
        return json.load(answer)


@pytest.mark.parametrize("name", SETTINGS)
def test_both_kinds_of_layers_train_alike(found: dict[str, Any], name: str) -> None:
    one = found[name]
    assert one["same_keys"]
    for local, engine in zip(one["local"], one["engine"], strict=True):
        assert engine == pytest.approx(local, rel=1e-5)
    assert one["farthest"] < 1e-5
