"""The pieces of the model that can be looked at alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from megavlm.config.freeze_mask import matches
from megavlm.config.padding import padded_vocabulary
from megavlm.config.recipes import RECIPES
from megavlm.config.schema import Config, Fp8
from megavlm.data.loading.batch import Batch
from megavlm.model.attention import PackedAttention, PackedSamples, TileAttention
from megavlm.model.connector.mlp import pixel_shuffle
from megavlm.model.fusion import place_features
from megavlm.model.positions import positions_of_patches, resize_positions
from megavlm.model.precision import tile_multiple
from megavlm.model.vision_layer import drop_path_rate
from tests.data.loading.test_batch import make_batch
from tests.ranks.runs import config_for


def test_pixel_shuffle_equals_transformers() -> None:
    from transformers.models.internvl.modeling_internvl import InternVLModel

    patches = torch.randn(3, 36, 5)
    expected = InternVLModel.pixel_shuffle(None, patches.view(3, 6, 6, 5), 0.5).reshape(3, 9, 20)
    torch.testing.assert_close(pixel_shuffle(patches, 2), expected)


def test_positions_are_resized_as_transformers_does() -> None:
    from transformers.models.internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings

    config = InternVLVisionConfig(hidden_size=8, image_size=(32, 32), patch_size=(4, 4))
    embeddings = InternVLVisionEmbeddings(config)
    embeddings.position_embeddings.data.normal_()
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 12 * 12 + 1, 8), 48, 48)
    torch.testing.assert_close(resize_positions(embeddings.position_embeddings, 12), expected)
    assert resize_positions(embeddings.position_embeddings, 8) is embeddings.position_embeddings


def test_positions_of_images_of_any_size_are_those_of_transformers() -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    table = torch.randn(1, 7 * 7, 5)
    grids = torch.tensor([[1, 4, 18], [1, 2, 2], [1, 7, 7], [1, 30, 6]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids, num_grid_per_side=7, mode="bilinear", align_corners=True
    )
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for _, h, w in grids.tolist()]
    sizes = grids[:, 1:].repeat_interleave(grids.prod(1), dim=0)
    found = positions_of_patches(table, torch.cat(places).T, sizes.T)
    torch.testing.assert_close(found, (table[0][indices] * weights[..., None]).sum(1))


def _batch(positions: list[int], numbers: list[int], num_features: int) -> Batch:
    places = dict(
        feature_positions=torch.tensor(positions, dtype=torch.long),
        feature_numbers=torch.tensor(numbers, dtype=torch.long),
    )
    return dataclasses.replace(make_batch(), **places, num_features=num_features)


def test_features_replace_placeholders_in_order() -> None:
    embeddings = torch.zeros(6, 1, 2)
    features = torch.arange(1.0, 4.0)[:, None, None].expand(3, 1, 2)
    placed = place_features(embeddings, features, _batch([1, 2, 5], [0, 1, 2], 3))
    assert placed[:, 0, 0].tolist() == [0, 1, 2, 0, 0, 3]
    of_another_rank = place_features(embeddings, features, _batch([3, 4], [0, 2], 3))
    assert of_another_rank[:, 0, 0].tolist() == [0, 0, 0, 1, 3, 0]
    with pytest.raises(ValueError, match="4 image placeholder tokens.*3 features"):
        place_features(embeddings, features, _batch([1, 2], [0, 1], 4))


@pytest.mark.parametrize("positions", [[], [0, 4]])
def test_features_of_blank_tiles_go_nowhere_and_get_a_gradient_of_zero(
    positions: list[int],
) -> None:
    features = torch.ones(4, 1, 2, requires_grad=True)
    batch = _batch(positions, list(range(len(positions))), len(positions))
    place_features(torch.ones(6, 1, 2), features, batch).sum().backward()
    assert features.grad[: len(positions)].eq(1).all()
    assert features.grad[len(positions) :].eq(0).all()


@pytest.mark.parametrize(
    ("layout", "recipe", "multiple"),
    [
        ({}, "none", 4),
        (dict(tensor_model_parallel_size=2), "none", 4),
        (dict(tensor_model_parallel_size=2, vision="data"), "none", 2),
        (dict(tensor_model_parallel_size=4, context_parallel_size=2, vision="data"), "none", 1),
        (dict(tensor_model_parallel_size=4, vision="data"), "tensorwise", 16),
    ],
)
def test_small_shares_of_the_tiles_need_little_filling(
    layout: dict, recipe: str, multiple: int
) -> None:
    config = config_for(Path("packs"), kernels="transformer_engine", **layout)
    assert tile_multiple(dataclasses.replace(config, fp8=Fp8(vision=recipe))) == multiple


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 4), ("mxfp8", 8), ("none", 1)])
def test_tiles_of_four_patches_come_in_fewer(recipe: str, multiple: int):
    arch = RECIPES["qwen2_vl"].architecture
    config = Config(stage="", model="", architecture=arch, fp8=Fp8(vision=recipe))
    assert tile_multiple(config) == multiple


def test_attention_of_a_pack_is_that_of_its_samples_with_grouped_queries() -> None:
    query = torch.randn(9, 4, 8)
    key = torch.randn(9, 2, 8)
    value = torch.randn(9, 2, 8)
    ends = torch.tensor([0, 4, 5, 9], dtype=torch.int32)
    lengths = tuple(ends.diff().tolist())
    packed = PackedSamples(qkv_format="thd", query_lengths=lengths, key_lengths=lengths)
    answer = PackedAttention()(query, key, value, None, packed_seq_params=packed)
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    sample = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])
    seen = (sample[:, None] == sample[None]) & (torch.arange(9)[:, None] >= torch.arange(9)[None])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(
        answer, torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)).flatten(1)
    )


def test_attention_without_a_mask_is_that_of_each_sample() -> None:
    # Neighbours of equal length, one by itself, and the same number of other keys.
    lengths = ((4, 4), (4, 4), (1, 4), (3, 3), (3, 2), (3, 2))
    queries, keys = zip(*lengths, strict=True)
    query = torch.randn(sum(queries), 4, 8)
    key, value = (torch.randn(sum(keys), 2, 8) for _ in range(2))
    packed = PackedSamples(qkv_format="thd", query_lengths=queries, key_lengths=keys)
    attention = PackedAttention(attn_mask_type=AttnMaskType.no_mask)
    answer = attention(query, key, value, None, packed_seq_params=packed)
    sample, seen = (
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(one)) for one in (queries, keys)
    )
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) / 8**0.5
    weights = scores.masked_fill(sample[:, None] != seen, float("-inf")).softmax(-1)
    torch.testing.assert_close(
        answer, torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)).flatten(1)
    )


def test_attention_of_a_pack_keeps_no_matrix_of_all_pairs_of_tokens() -> None:
    tokens = 2000
    query = torch.randn(tokens, 4, 8, requires_grad=True)
    key, value = (torch.randn(tokens, 2, 8, requires_grad=True) for _ in range(2))
    packed = PackedSamples(qkv_format="thd", query_lengths=(tokens,), key_lengths=(tokens,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        PackedAttention()(query, key, value, None, packed_seq_params=packed)
    assert kept and max(kept) < tokens * tokens


def test_attention_of_tiles_keeps_to_the_tile() -> None:
    query, key, value = (torch.randn(5, 3, 2, 4) for _ in range(3))
    answer = TileAttention()(query, key, value)
    weights = (torch.einsum("qihd,kihd->ihqk", query, key) / 2).softmax(-1)
    torch.testing.assert_close(answer, torch.einsum("ihqk,kihd->qihd", weights, value).flatten(2))


def test_drop_path_grows_linearly_over_the_depth() -> None:
    assert [drop_path_rate(0.4, layer, 5) for layer in range(5)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3, 0.4]
    )
    assert drop_path_rate(0.4, 0, 1) == 0.0


def test_the_padded_vocabulary_does_not_depend_on_the_layout() -> None:
    assert [padded_vocabulary(size) for size in (1, 128, 129, 151674)] == [128, 128, 256, 151680]


def test_a_freeze_pattern_means_a_part_a_module_or_a_name() -> None:
    key = "vision.encoder.layers.12.mlp.linear_fc1.weight"
    for pattern in (
        "vision",
        "vision.encoder",
        "vision.encoder.layers.1?",
        "*.mlp.*",
        "vision.encoder.layers.12.mlp.linear_fc1.weight",
    ):
        assert matches(key, pattern), pattern
    for pattern in ("visio", "language", "vision.encoder.layers.1", "mlp"):
        assert not matches(key, pattern), pattern
