"""Models of Transformer Engine's layers are built, on a machine without a GPU too, and hold what
models of local layers hold.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.te.process import answer_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="Transformer Engine is not installed",
)


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Return what ``build.py`` prints, from a process of its own."""
    return answer_of("tests.te.build", variables={"CUDA_VISIBLE_DEVICES": ""})


def test_checkpoint_keys_and_shapes_are_those_of_local_layers(built: dict[str, Any]) -> None:
    assert built["engine"]["sizes"] == built["local"]["sizes"]
    assert built["engine"]["shapes"] == built["local"]["shapes"]
    assert built["engine"]["dtypes"] == ["torch.bfloat16"]


def test_the_same_weights_are_filled_in(built: dict[str, Any]) -> None:
    assert built["engine"]["sums"] == built["local"]["sums"]
    assert sum(value != 0 for value in built["engine"]["sums"].values()) > 50


def test_models_with_other_norms_and_a_tied_head_hold_the_same_too(built: dict[str, Any]) -> None:
    local, engine = built["normed"]
    for what in ("sizes", "shapes", "sums", "dtypes"):
        assert engine[what] == local[what], what
    assert any("q_layernorm" in key for key in engine["sizes"]) and any(
        "qk_norm" in key for key in engine["sizes"]
    )
    assert not any("output_layer" in key for key in engine["sizes"])


def test_experts_of_one_grouped_kernel_hold_the_same_too(built: dict[str, Any]) -> None:
    local, engine = built["mixture"]
    for what in ("sizes", "shapes", "sums", "dtypes"):
        assert engine[what] == local[what], what
    assert sum(".mlp.experts.4.linear_fc1.weight" in key for key in engine["sizes"]) == 3
    grouped = "TEColumnParallelGroupedLinear"
    assert grouped in engine["modules"] and grouped not in local["modules"]


@pytest.mark.parametrize("way", ["to local", "to engine"])
def test_a_checkpoint_of_one_kind_of_layers_loads_into_the_other(
    built: dict[str, Any], way: str
) -> None:
    assert built["moved"][way]["before"] != built["local"]["sums"]
    assert built["moved"][way]["after"] == built["local"]["sums"]


def test_layers_are_transformer_engines(built: dict[str, Any]) -> None:
    names = set(built["engine"]["modules"])
    assert {
        "TELayerNormColumnParallelLinear",
        "TERowParallelLinear",
        "TEDotProductAttention",
    } <= names
    assert not {"Norm", "TileAttention", "PackedAttention", "RowParallelLinear"} & names


def test_weight_gradients_are_summed_inside_the_products(built: dict[str, Any]) -> None:
    products = built["engine"]["sums_in_product"]
    assert len(products) == 4 * 6 + 2 and all(products.values())


def test_tiles_come_in_sixteens_where_fp8_asks_for_it(built: dict[str, Any]) -> None:
    assert built["tile_multiple"] == {"local": 1, "engine": 4, "fp8": 16}


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("delayed", "TEDelayedScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ],
)
def test_each_recipe_reaches_both_parts_and_no_checkpoint(
    built: dict[str, Any], recipe: str, kind: str
) -> None:
    found = built["recipes"][recipe]
    assert found["classes"] == {"vision": kind, "language": kind}, "the connector stays in 16 bits"
    assert found["spared"] == ([] if recipe == "delayed" else [0])
    assert found["sizes"] == built["local"]["sizes"]


def test_the_pretence_ends_with_its_process() -> None:
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
