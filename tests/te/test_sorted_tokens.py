"""Transformer Engine's Triton kernels sort tokens by expert as megatron-core's torch operations do,
with all gradients, as Triton's interpreter runs them on a CPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.te.process import answer_of
from tests.te.sorted_tokens import CASES, NEEDS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``sorted_tokens.py`` prints, from a process of its own."""
    variables = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return answer_of("tests.te.sorted_tokens", "-O", variables=variables)


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_sort_tokens_as_torch_does(found: dict[str, Any], name: str, need: str) -> None:
    distances = found[f"{name}, {need}"]
    assert len(distances) == (3 if need == "both" else 2)
    assert all(distance < 1e-3 for distance in distances), distances
