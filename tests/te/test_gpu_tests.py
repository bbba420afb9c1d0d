"""The tests that a GPU is to run pass on a CPU, as far as it can run them."""

from __future__ import annotations

import importlib.util

import pytest

from tests.te.gpu_tests import CHOSEN
from tests.te.process import answer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)


def test_tests_for_a_gpu_pass_where_torch_computes_for_it() -> None:
    variables = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    found = answer_of("tests.te.gpu_tests", "-O", variables=variables)
    assert {name: told for name, told in found.items() if told != "passed"} == {}
    assert all(any(words in name for name in found) for words in CHOSEN)
