"""On a CPU, Transformer Engine's layers with torch operations in place of its compiled functions
train as local layers do: losses, gradient norms, weights after two steps, and answers.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.te.numbers import SETTINGS
from tests.te.process import answer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``numbers.py`` prints, from a process of its own."""
    return answer_of("tests.te.numbers", "-O", variables={"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize("name", SETTINGS)
def test_both_kinds_of_layers_train_alike(found: dict[str, Any], name: str) -> None:
    one = found[name]
    assert one["same_keys"]
    for local, engine in zip(one["local"], one["engine"], strict=True):
        assert engine == pytest.approx(local, rel=1e-5)
    assert one["farthest"] < 1e-5
    assert one["answers"] == one["local_answers"]
    assert len(set(map(tuple, one["answers"]))) > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_models_on_both_kinds_of_layers_leave_memory(found: dict[str, Any], name: str) -> None:
    assert found[name]["left"] == []
