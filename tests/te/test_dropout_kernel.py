"""The Triton kernel of dropout on the input of adapters drops what torch's operations drop, as
Triton's interpreter runs it on a CPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.te.process import answer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what ``dropped.py`` prints, from a process of its own."""
    return answer_of("tests.te.dropped", variables={"TRITON_INTERPRET": "1"})


def test_the_kernel_drops_the_same_numbers(found: dict[str, Any]) -> None:
    for name, one in found.items():
        assert all(one["equal"]), name
        assert all(0.27 < share < 0.33 for share in one["zeros"]), name
        # The interpreter cuts where a GPU rounds to 16 bits.
        assert one["farthest"] <= (1e-6 if "float32" in name else 2**-7), name


def test_the_kernel_moves_every_number_once_and_sixteen_bytes_at_a_time() -> None:
    """A program of 128 threads moves its 16 x 128 numbers in two goes."""
    kernels = answer_of("tests.te.compiled_kernels", variables={})
    assert kernels["_multiply"] == {"reads": 2, "writes": 2}
