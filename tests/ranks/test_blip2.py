"""BLIP-2's second stage: logits against ``transformers``, packs against their samples alone, its
cost against torch's count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.recipes.blip2 import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import pieces, training_cost
from tests.convert.blip2_models import KINDS, OPT, make_blip2
from tests.data.samples import make_dataset, make_sample, write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, train_curve, whole_weights
from tests.ranks.test_against_transformers import answers_of_pack
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_packs import losses_and_gradients

CONTEXT = 7
WORLDS = {
    "one process": (1, {}),
    "tp2": (2, dict(tensor_model_parallel_size=2)),
    "pp2": (2, dict(pipeline_model_parallel_size=2)),
}
MASK = STAGES["2"].training.trainable
EVERYDAY = [
    layout
    for layout in LAYOUTS
    if asks_for_all() or str(layout) in ("TP2 SP", "PP2", "CP2", "DP2", "TP2 whole vision layers")
]
TIED = ("opt", "llama") if not asks_for_all() else tuple(KINDS)


def _sizes(architecture: Architecture) -> dict[str, int]:
    return dict(
        vocab_size=architecture.language.vocab_size,
        context_token_id=CONTEXT,
        tile_size=architecture.vision.image_size,
        features_per_tile=architecture.features_per_tile,
    )


def _config(architecture: Architecture, packs: Path, **settings) -> Config:
    return dataclasses.replace(
        config_for(packs, **settings), architecture=architecture, recipe="blip2"
    )


def captions(architecture: Architecture, lengths: tuple[int, ...]) -> list:
    """Make samples of one image each, with so many tokens of text."""
    rng = np.random.default_rng(1)
    sizes = _sizes(architecture)
    return [
        make_sample(rng, images=1, text_tokens=length, line=number, **sizes)
        for number, length in enumerate(lengths, start=1)
    ]


def answers_of_transformers(folder: Path, packs: Path, architecture: Architecture) -> list:
    """Of each sample, run by itself: its place in the pack, its logits, and the losses of all its
    tokens but the last.
    """
    from megavlm.convert.hf.reference import load_reference
    from megavlm.data.loading.dataset import PackedDataset

    batch = PackedDataset(packs).batch(0, 0)
    model = load_reference(folder)
    pixel = (architecture.vision.pixel_mean, architecture.vision.pixel_std)
    mean, std = (torch.tensor(x)[:, None, None] for x in pixel)
    pixels = (batch.tiles / 255 - mean) / std
    ends = batch.sample_ends.tolist()
    found = []
    tile = 0
    for start, end in zip(ends[:-2], ends[1:-1], strict=True):
        tokens = batch.tokens[start:end]
        count = int((tokens == CONTEXT).sum()) // architecture.features_per_tile
        with torch.no_grad():
            own = pixels[tile : tile + count]
            logits = model(input_ids=tokens[None], pixel_values=own).logits[0]
        tile += count
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        found.append((slice(start, end), logits, losses))
    return found


@pytest.mark.parametrize("kind", TIED)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    packs = tmp_path / "packs"
    samples = captions(architecture, (9, 4, 17))
    write_packs(packs, [samples], capacity=96, **_sizes(architecture))
    folder = make_blip2(tmp_path / "hf", architecture, torch.float32, CONTEXT, spread=0.05)
    expected = answers_of_transformers(folder, packs, architecture)
    for name, (world, settings) in WORLDS.items():
        config = _config(architecture, packs, head_tokens="all", **settings)
        found = ranks.run(answers_of_pack, world, config, folder)
        answers = [answer for answer in found if answer is not None]
        logits = torch.from_numpy(np.concatenate([share for share, _ in answers], axis=-1))
        logits = logits[:, : architecture.language.vocab_size]
        for sample, their_logits, their_losses in expected:
            assert (logits[sample] - their_logits).abs().max() <= 1e-4, name
            assert torch.equal(logits[sample].argmax(-1), their_logits.argmax(-1)), name
            theirs = float(their_losses.sum())
            for _, losses in answers:
                assert losses[sample][:-1].sum() == pytest.approx(theirs, rel=1e-5), name


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    samples = captions(OPT, (12, 5, 27, 8))
    sizes = _sizes(OPT)
    write_packs(tmp_path / "together", [samples], capacity=128, **sizes)
    write_packs(tmp_path / "alone", [[sample] for sample in samples], capacity=128, **sizes)
    [(together, gradients)] = ranks.run(
        losses_and_gradients, 1, _config(OPT, tmp_path / "together")
    )
    [(alone, expected)] = ranks.run(losses_and_gradients, 1, _config(OPT, tmp_path / "alone"))
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        limit = 1e-5 * np.abs(expected[key]).max() + 1e-7
        np.testing.assert_allclose(gradient, expected[key], atol=limit, err_msg=key)


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count.
    language = dataclasses.replace(OPT.language, vocab_size=256)
    architecture = dataclasses.replace(OPT, language=language)
    make_dataset(tmp_path, packs=1, image_share=1.0, **_sizes(architecture))
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, MASK, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, MASK).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_dataset(folder, packs=12, capacity=240, alignment=4, **_sizes(OPT))
    return folder


@pytest.mark.parametrize("layout", EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(ranks: Pool, packs: Path, layout: Layout) -> None:
    layers = max(2, layout.layers)
    architecture = dataclasses.replace(
        OPT,
        vision=dataclasses.replace(OPT.vision, num_layers=layers, num_attention_heads=4),
        language=dataclasses.replace(OPT.language, num_layers=layers),
    )
    settings = dict(trainable=MASK, adam_eps=1e-3, steps=4)
    [expected] = ranks.run(train_curve, 1, _config(architecture, packs, **settings))
    config = _config(architecture, packs, **settings, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    assert max(compare(curves, expected).values()) <= LIMIT


def test_frozen_parts_stay_bit_for_bit_and_the_norm_behind_the_encoder_is_trained(
    ranks: Pool, packs: Path
) -> None:
    fresh = whole_weights(ranks.run(train_curve, 1, _config(OPT, packs, trainable=MASK, steps=0)))
    after = whole_weights(ranks.run(train_curve, 1, _config(OPT, packs, trainable=MASK, steps=2)))
    changed = {key for key, weight in after.items() if not np.array_equal(weight, fresh[key])}
    assert changed == {key for key in after if key.startswith("connector.")}
    assert "connector.norm.weight" in changed
