"""Under FP8 the tokens of each expert are padded to what its products take, and no row of the
padding comes out.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.te import fake_cuda
from tests.te.fake_experts import BIASES, SETTINGS, TOKENS
from tests.te.process import answer_of
from tests.te.test_fake_step import MISSING

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PADDED = {
    f"{recipe}{biases}": multiple
    for recipe, multiple in {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}.items()
    for biases in ("", BIASES)
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what ``fake_experts.py`` prints, from a process of its own."""
    libraries = fake_cuda.libraries(tmp_path_factory.mktemp("libraries"))
    return answer_of("tests.te.fake_experts", variables=libraries)


@pytest.mark.parametrize("name", SETTINGS)
def test_output_and_gradients_have_the_rows_of_the_tokens(found: dict[str, Any], name: str) -> None:
    tokens = sum(TOKENS)
    assert found[name]["shapes"] == [[tokens, 256], [tokens, 256], [tokens]]
    # Two linear layers: output, and gradients of input and weight.
    assert len(found[name]["products"]) == 6


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.endswith(BIASES)])
def test_every_bias_has_a_gradient(found: dict[str, Any], name: str) -> None:
    # Gate and other half of each expert, and what comes out.
    count = len(TOKENS)
    assert found[name]["biases"] == [[2 * 96]] * count + [[256]] * count


@pytest.mark.parametrize("name", PADDED)
def test_every_grouped_product_is_in_8_bits_on_padded_rows(
    found: dict[str, Any], name: str
) -> None:
    multiple = PADDED[name]
    padded = [-(-count // multiple) * multiple for count in TOKENS]
    assert found[name]["products"] == [[True, padded]] * 6


def test_without_fp8_nothing_is_padded(found: dict[str, Any]) -> None:
    assert found["16 bits"]["products"] == [[False, list(TOKENS)]] * 6


def test_a_layer_in_16_bits_has_no_product_in_8(found: dict[str, Any]) -> None:
    assert not any(in_8_bits for in_8_bits, _ in found["a layer in 16 bits"]["products"])
