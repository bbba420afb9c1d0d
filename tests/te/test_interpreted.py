"""The Triton kernels of adapters give what torch's operations give, as Triton's interpreter runs
them on a CPU.
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
    """Return what ``interpreted.py`` prints, from a process of its own."""
    return answer_of("tests.te.interpreted", variables={"TRITON_INTERPRET": "1"})


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Return what ``compiled_kernels.py`` prints, from a process of its own."""
    return answer_of("tests.te.compiled_kernels", variables={})


def limit(name: str) -> float:
    """Return how far results may be apart: the interpreter cuts where a GPU rounds to 16 bits."""
    return 1e-6 if "float32" in name else 2**-7


def test_dropout_drops_the_same_numbers(found: dict[str, Any]) -> None:
    assert len(found["dropout"]) == 8
    for name, one in found["dropout"].items():
        assert all(one["equal"]), name
        assert all(0.27 < share < 0.33 for share in one["zeros"]), name
        assert one["farthest"] <= limit(name), name


def test_weights_of_4_bits_are_the_same(found: dict[str, Any]) -> None:
    assert len(found["nf4"]) == 4
    for name, one in found["nf4"].items():
        assert one["farthest"] <= limit(name), name
        assert 0.01 < one["from_weight"] < 0.2, name


def test_dropout_moves_every_number_once_and_sixteen_bytes_at_a_time(
    compiled: dict[str, Any],
) -> None:
    """A program of 128 threads moves its 16 x 128 numbers in two goes."""
    found = compiled["_multiply"]
    assert (found["reads"], found["writes"]) == (2, 2)


def test_weights_of_4_bits_are_written_sixteen_bytes_at_a_time(compiled: dict[str, Any]) -> None:
    """A program of 128 threads writes its 1,024 numbers in one go."""
    assert compiled["_dequantise"]["writes"] == 1


def test_tensors_may_have_more_numbers_than_32_bits_count(compiled: dict[str, Any]) -> None:
    assert len(compiled) == 4
    assert all(found["is_wide"] for found in compiled.values()), compiled
