"""What a step costs, by pencil and paper."""

from __future__ import annotations

import dataclasses

import pytest

from megavlm.config.models import architecture
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.planner.flops import pieces, training_cost

SMALL = Architecture(
    vision=Vision(
        image_size=8,
        patch_size=2,
        num_layers=2,
        hidden_size=6,
        ffn_hidden_size=10,
        num_attention_heads=2,
    ),
    language=Language(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=30,
    ),
)
DATA = dict(tokens=100.0, squared_lengths=4000.0, tiles=5.0)

# A tile has 17 tokens and 4 features of 24; queries, keys and values of a token of the language
# model have 8 + 2 * 4 numbers.
PATCHES = 5 * 16 * 2 * (3 * 2 * 2) * 6
VISION_LAYERS = 2 * 5 * (17 * 2 * (6 * 18 + 6 * 6 + 2 * 6 * 10) + 4 * 17 * 17 * 6)
CONNECTOR = 5 * 4 * 2 * (24 * 8 + 8 * 8)
LANGUAGE_LINEAR = 3 * 100 * 2 * (8 * 16 + 8 * 8 + 3 * 8 * 12)
LANGUAGE_ATTENTION = 3 * 4000 * 2 * 8
HEAD = 100 * 2 * 8 * 30
FORWARD = {
    "vision": PATCHES + VISION_LAYERS,
    "connector": CONNECTOR,
    "language": LANGUAGE_LINEAR + LANGUAGE_ATTENTION,
    "head": HEAD,
}


def test_the_forward_pass_is_what_pencil_and_paper_give():
    assert training_cost(SMALL, ()).by_part(**DATA) == FORWARD


def test_everything_trained_costs_three_forward_passes_but_for_the_gradient_of_the_pixels():
    cost = training_cost(SMALL, ("vision", "connector", "language"))
    assert cost.total(**DATA) == 3 * sum(FORWARD.values()) - PATCHES


def test_with_the_connector_alone_the_other_parts_have_no_gradients_of_weights():
    by_part = training_cost(SMALL, ("connector",)).by_part(**DATA)
    assert by_part["vision"] == FORWARD["vision"]
    assert by_part["connector"] == 3 * FORWARD["connector"], (
        "its norm is trained too, so the gradient of the first linear's input is needed"
    )
    assert by_part["language"] == 2 * LANGUAGE_LINEAR + 3 * LANGUAGE_ATTENTION
    assert by_part["head"] == 2 * HEAD


def test_nothing_before_the_lowest_trained_weight_has_a_backward_pass():
    by_part = training_cost(SMALL, ("language.decoder.layers.2.mlp.*",)).by_part(**DATA)
    assert (by_part["vision"], by_part["connector"]) == (FORWARD["vision"], FORWARD["connector"])
    mlp = 100 * 2 * 3 * 8 * 12
    assert by_part["language"] == LANGUAGE_LINEAR + LANGUAGE_ATTENTION + 2 * mlp
    assert by_part["head"] == 2 * HEAD


def test_a_trained_bias_asks_for_the_gradients_of_all_that_comes_after_it():
    by_part = training_cost(SMALL, ("vision.encoder.layers.1.mlp.linear_fc2.bias",)).by_part(**DATA)
    assert by_part["vision"] == FORWARD["vision"]
    assert by_part["connector"] == 2 * FORWARD["connector"]


def test_a_large_model_costs_about_six_flops_a_weight_and_token():
    big = architecture("internvl2_5-8b")
    weights = sum(
        piece.elements
        for piece in pieces(big)
        if piece.key.startswith("language.") and piece.forward
    )
    cost = training_cost(big, ("language",)).by_part(tokens=1.0, squared_lengths=0.0, tiles=0.0)
    assert cost["language"] + cost["head"] == pytest.approx(6 * weights, rel=0.01)


def test_the_head_is_counted_for_the_tokens_that_have_a_loss():
    cost = training_cost(SMALL, ("vision", "connector", "language"))
    quarter = cost.by_part(**DATA, supervised=25.0)
    assert quarter["head"] == 3 * HEAD / 4
    assert cost.by_part(**DATA)["head"] == 3 * HEAD
    assert all(quarter[part] == cost.by_part(**DATA)[part] for part in FORWARD if part != "head")


def _language_flops(prefix_lm: bool = False, **language: object) -> float:
    arch = dataclasses.replace(
        SMALL, prefix_lm=prefix_lm, language=dataclasses.replace(SMALL.language, **language)
    )
    return training_cost(arch, ()).by_part(**DATA)["language"] - LANGUAGE_LINEAR


def test_windows_count_whole_for_each_token_in_the_layers_that_have_them():
    """Two of three layers see five tokens, the last one half of all pairs."""
    windows = dict(window_size=5, window_attn_skip_freq=3)
    assert _language_flops(**windows) == 2 * 100 * 5 * 4 * 8 + 4000 * 2 * 8
    assert _language_flops(window_size=5) == 3 * 100 * 5 * 4 * 8
    assert _language_flops(prefix_lm=True, **windows) == 3 * 4000 * 4 * 8


def test_all_pairs_count_where_all_tokens_see_each_other():
    assert _language_flops() == LANGUAGE_ATTENTION
    assert _language_flops(prefix_lm=True) == 2 * LANGUAGE_ATTENTION
    # A text encoder without a causal mask, whose MLP has no gate but biases.
    found = _language_flops(family="siglip_text", activation="gelu_tanh", num_query_groups=4)
    linear = 3 * 100 * 2 * (8 * 24 + 8 * 8 + 2 * 8 * 12)
    assert found == 2 * LANGUAGE_ATTENTION + linear - LANGUAGE_LINEAR
