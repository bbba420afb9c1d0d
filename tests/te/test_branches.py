"""The Triton kernels that add residual branches give what torch's operations give, as Triton's
interpreter runs them on a CPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.te.branches import SETTINGS
from tests.te.process import answer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``branches.py`` prints, from a process of its own."""
    return answer_of("tests.te.branches", variables={"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("name", SETTINGS)
def test_kernels_calculate_in_float32(found: dict[str, Any], name: str) -> None:
    """Compared with float64: in 16 bits, only results are rounded; the interpreter cuts them."""
    assert max(found[name]["float32"]) < 1e-6
    assert max(found[name]["bfloat16"]) < 2**-7


@pytest.mark.parametrize("kernel", ["_add", "_add_backward"])
def test_kernels_move_every_large_tensor_once_and_sixteen_bytes_at_a_time(kernel: str) -> None:
    """A program of 128 threads moves its 16 x 128 elements of a tensor in two goes."""
    found = answer_of("tests.te.compiled_kernels", variables={})[kernel]
    assert (found["reads"], found["writes"]) == (2 * 2, 2)
