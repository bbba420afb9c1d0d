"""On a CPU, several ranks of Transformer Engine's layers, with torch operations in place of its
compiled functions, train as local layers do in one process: losses, gradient norms, weights.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.te.process import answer_of
from tests.te.rank_numbers import RUNS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)
# torch's compiler would start in each rank.
VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``rank_numbers.py`` prints, from a process of its own."""
    return answer_of("tests.te.rank_numbers", "-O", variables=VARIABLES)


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_like_one_process(found: dict[str, Any], name: str) -> None:
    one = found[name]
    assert "error" not in one, one["error"]
    assert one["same_keys"] and len(one["ranks"]) == RUNS[name].ranks
    for rank in one["ranks"]:
        for alone, together in zip(one["alone"], rank, strict=True):
            assert together == pytest.approx(alone, rel=1e-5)
    assert one["farthest"] < 1e-5
