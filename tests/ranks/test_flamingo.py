"""Flamingo: logits against ``transformers``, what reads which image, its cost against torch's
count, and its training at other layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.recipes.flamingo import STAGES
from megavlm.config.schema import Architecture, Config
from megavlm.data.sample import Sample
from megavlm.planner.flops import pieces, training_cost
from tests.convert.idefics_models import FLAMINGO, KINDS, make_idefics
from tests.data.samples import make_sample, write_packs
from tests.ranks.layouts import LAYOUTS, LIMIT, Layout, asks_for_all
from tests.ranks.model_checks import (
    CONTEXT,
    END,
    answers_of_pack,
    answers_of_transformers,
    assert_equals_transformers,
    assert_pack_equals_samples_alone,
    recipe_config,
    sizes_of,
)
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, Curve, train_curve, whole_weights
from tests.ranks.test_cost import counted_by_torch
from tests.ranks.test_layouts import compare
from tests.ranks.test_memory import assert_memory_is_held

STEPS = dict(adam_eps=1e-3, steps=3)
MASK = STAGES["1"].training.trainable
# Gates that are open: at zero nothing behind them has a gradient.
OPEN = dataclasses.replace(
    FLAMINGO, cross_attention=dataclasses.replace(FLAMINGO.cross_attention, gate_start=0.7)
)
EVERYDAY = [
    layout
    for layout in LAYOUTS
    if asks_for_all() or str(layout) in ("TP2 SP", "PP2", "CP2", "DP2", "TP2 whole vision layers")
]


_config = partial(recipe_config, "flamingo", trainable=MASK)


def document(
    rng: np.random.Generator, architecture: Architecture, images: int, words: int, line: int
) -> Sample:
    """Make a text with images anywhere in it, and texts that end in the middle of it."""
    sizes = sizes_of(architecture)
    sample = make_sample(rng, images=images, text_tokens=words, line=line, grids=((1, 1),), **sizes)
    order = rng.permutation(sample.length)
    tokens = sample.tokens[order]
    tokens[(tokens == END) & (np.arange(len(tokens)) % 3 > 0)] = END + 1
    supervised = (tokens != CONTEXT) & (np.arange(len(tokens)) > 0)
    return dataclasses.replace(sample, tokens=tokens, supervised=supervised)


def documents(architecture: Architecture, images: tuple[int, ...], seed: int = 1) -> list[Sample]:
    """Make documents with so many images."""
    rng = np.random.default_rng(seed)
    return [
        document(rng, architecture, number, 9 + 4 * line, line)
        for line, number in enumerate(images, start=1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_those_of_transformers(
    ranks: Pool, tmp_path: Path, kind: str
) -> None:
    architecture = KINDS[kind]
    samples = documents(architecture, (1, 0, 3, 2))
    # Behind an end no image is read until the next one.
    tokens = samples[0].tokens
    tokens[np.flatnonzero(tokens == CONTEXT)[0] + 1] = END
    packs = tmp_path / "packs"
    write_packs(packs, [samples], capacity=96, end_token_id=END, **sizes_of(architecture))
    folder = make_idefics(tmp_path / "hf", architecture, torch.float32, spread=0.1)
    expected = answers_of_transformers(folder, packs, architecture)
    configure = partial(_config, architecture, packs)
    assert_equals_transformers(ranks, configure, folder, expected)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write packs of documents; some have no image."""
    folder = tmp_path_factory.mktemp("packs") / "train"
    rng = np.random.default_rng(0)
    lines = count(1)
    contents = [(1, 0, 3), (0, 0), (2, 1, 1), (0, 2)] * 3
    chosen = [
        [document(rng, OPEN, number, int(rng.integers(8, 26)), next(lines)) for number in images]
        for images in contents
    ]
    sizes = sizes_of(OPEN)
    write_packs(folder, chosen, capacity=128, alignment=4, end_token_id=END, **sizes)
    return folder


def _of_layers(layers: int) -> Architecture:
    """Return a model whose both parts have so many layers, and heads that divide."""
    vision = dataclasses.replace(OPEN.vision, num_layers=layers, num_attention_heads=4)
    language = dataclasses.replace(
        OPEN.language, num_layers=layers, num_attention_heads=4, num_query_groups=4
    )
    return dataclasses.replace(OPEN, vision=vision, language=language)


@pytest.fixture(scope="module")
def alone(ranks: Pool, packs: Path) -> Callable[[int], Curve]:
    """Return a cached function that trains a model of so many layers in one process."""
    return cache(
        lambda layers: ranks.run(train_curve, 1, _config(_of_layers(layers), packs, **STEPS))[0]
    )


def _apart(curves: list[Curve], expected: Curve) -> dict[str, float]:
    """Compare without the biases of the keys' norms: softmax does not see them, and their gradients
    are rounding.
    """

    def known(curve: Curve) -> Curve:
        shards = [shard for shard in curve.shards if not shard[0].endswith("key_norm.bias")]
        return dataclasses.replace(curve, shards=shards)

    return compare([known(curve) for curve in curves], known(expected))


@pytest.mark.parametrize("layout", EVERYDAY, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, packs: Path, alone: Callable[[int], Curve], layout: Layout
) -> None:
    config = _config(_of_layers(layout.layers), packs, **STEPS, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    assert max(_apart(curves, alone(layout.layers)).values()) <= LIMIT


def gradients_of_rank(config: Config) -> dict[str, float]:
    """Fill this rank's gradients with its number, finish them, and return what they are then."""
    from megavlm.model.weights import named_weights
    from tests.ranks.runs import build

    job = build(config)
    gradients = {
        key: weight.main_grad
        for key, weight in named_weights(job.chunks[0]).items()
        if weight.requires_grad
    }
    for gradient in gradients.values():
        gradient.fill_(job.groups.tensor_rank)
    job.chunks[0].finish_gradients()
    return {key: float(gradient.mean()) for key, gradient in gradients.items()}


@pytest.mark.parametrize("vision", ["tensor", "data"])
def test_tensor_ranks_agree_on_gradients_of_what_all_of_them_hold_whole(
    ranks: Pool, packs: Path, vision: str
) -> None:
    layout = dict(tensor_model_parallel_size=2, vision=vision)
    found = ranks.run(gradients_of_rank, 2, _config(_of_layers(2), packs, **layout))
    of_connector = 0.5 if vision == "tensor" else 1.0  # tiles of their own are summed
    for rank, values in enumerate(found):
        wanted = {"connector": of_connector, "added": 0.5, "decoder": rank}
        for key, value in values.items():
            part = next(name for name in wanted if name in key)
            assert value == wanted[part], key


def gates_behind_an_update(config: Config) -> dict[str, float]:
    """Update all gates by the same gradient, and return what this rank reports of them then."""
    from megavlm.model.weights import named_weights
    from megavlm.train.gates import Gates
    from megavlm.train.optimizer import prepare_gradient, set_rates, update_weights
    from tests.ranks.runs import build

    job = build(config)
    for key, weight in named_weights(job.chunks[0]).items():
        if weight.requires_grad:
            weight.main_grad.fill_(float(key.endswith("_gate")))
    set_rates(job.optimizer, config, 2)
    update_weights(
        job.optimizer, prepare_gradient(job.optimizer, job.part_norms.sums, job.backend.device), 0.0
    )
    return Gates(job.ddp_chunks).report(job.groups, 1)["gate"]


def test_gates_are_reported_behind_the_update_on_every_replica(ranks: Pool, packs: Path) -> None:
    config = _config(_of_layers(2), packs, **STEPS)
    first, second = ranks.run(gates_behind_an_update, 2, config)
    assert first == second and len(first) == 2
    assert all(value < np.tanh(0.7) - 1e-4 for value in first.values()), first


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_images_go_along_the_pipeline_and_through_what_is_recomputed(
    ranks: Pool, packs: Path, alone: Callable[[int], Curve], recompute: str
) -> None:
    layout = dict(
        pipeline_model_parallel_size=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        layout="v*3,c,t|t*2,h",
        recompute=recompute,
    )
    curves = ranks.run(train_curve, 4, _config(_of_layers(3), packs, **STEPS, **layout))
    assert max(_apart(curves, alone(3)).values()) <= LIMIT


def test_a_model_with_grouped_queries_trains_too(ranks: Pool, packs: Path) -> None:
    language = dataclasses.replace(
        _of_layers(3).language, family="qwen2", qkv_bias=True, num_query_groups=2
    )
    architecture = dataclasses.replace(_of_layers(3), language=language)
    [expected] = ranks.run(train_curve, 1, _config(architecture, packs, **STEPS))
    settings = dict(tensor_model_parallel_size=2, **STEPS)
    curves = ranks.run(train_curve, 2, _config(architecture, packs, **settings))
    assert max(_apart(curves, expected).values()) <= LIMIT


def test_the_cost_is_what_torch_counts(ranks: Pool, tmp_path: Path) -> None:
    # As many tokens as rows of the padded vocabulary, since padding is computed but does not count;
    # and every token reads an image, as the planner counts.
    language = dataclasses.replace(FLAMINGO.language, vocab_size=256)
    architecture = dataclasses.replace(FLAMINGO, language=language, added_tokens=0)
    samples = documents(architecture, (1, 2))
    for sample in samples:
        place = int(np.flatnonzero(sample.tokens == CONTEXT)[0])
        sample.tokens[[0, place]] = sample.tokens[[place, 0]]
        sample.supervised[:] = sample.tokens != CONTEXT
    length = sum(sample.length for sample in samples)
    write_packs(tmp_path, [samples], capacity=length, **sizes_of(architecture))
    mask = ("connector", "language.decoder.layers.*.cross")
    [(counted, size, keys)] = ranks.run(counted_by_torch, 1, tmp_path, mask, architecture)
    size["squared_lengths"] *= 2  # torch counts all pairs of tokens
    assert training_cost(architecture, mask).total(**size) == counted
    assert {piece.key for piece in pieces(architecture)} - {""} == keys


@pytest.mark.parametrize(
    "settings",
    [
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        dict(pipeline_model_parallel_size=2, layout="v*3,c,t|t*2,h"),
    ],
    ids=["tensor", "pipeline"],
)
def test_memory_is_what_a_model_that_is_built_takes(
    ranks: Pool, packs: Path, settings: dict
) -> None:
    settings = dict(precision="bfloat16", global_batch_size=2) | settings
    assert_memory_is_held(ranks, _config(_of_layers(3), packs, **settings), 2)


def test_with_closed_gates_it_is_the_language_model_alone(ranks: Pool, tmp_path: Path) -> None:
    from transformers import IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM

    samples = documents(FLAMINGO, (2, 0, 1))
    write_packs(tmp_path / "packs", [samples], capacity=96, **sizes_of(FLAMINGO))
    folder = make_idefics(tmp_path / "hf", FLAMINGO, torch.float32, spread=0.1)
    model = IdeficsForVisionText2Text.from_pretrained(folder)
    for layer in model.model.gated_cross_attn_layers:
        layer.alpha_cross_attn.data.zero_()
        layer.alpha_dense.data.zero_()
    model.save_pretrained(folder)
    found = model.state_dict()
    head = [found["lm_head.weight"], found["lm_head.additional_fc.weight"]]
    embedding = [
        found[f"model.embed_tokens.{name}weight"] for name in ("", "additional_embedding.")
    ]
    settings = dict(vocab_size=FLAMINGO.language.vocab_size, rms_norm_eps=1e-6)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    settings |= {name: getattr(model.config, name) for name in names}
    bare = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    weights = {name: weight for name, weight in found.items() if name in bare.state_dict()}
    weights |= {
        "lm_head.weight": torch.cat(head),
        "model.embed_tokens.weight": torch.cat(embedding),
    }
    bare.load_state_dict(weights)
    [(logits, _)] = ranks.run(
        answers_of_pack, 1, _config(FLAMINGO, tmp_path / "packs", head_tokens="all"), folder
    )
    start = 0
    for sample in samples:
        with torch.no_grad():
            wanted = bare(torch.from_numpy(sample.tokens.astype(np.int64))[None]).logits[0]
        mine = logits[start : start + sample.length, : FLAMINGO.language.vocab_size]
        np.testing.assert_allclose(mine, wanted.numpy(), atol=1e-5)
        start += sample.length


def test_an_image_changes_only_what_stands_behind_it_in_its_sample(
    ranks: Pool, tmp_path: Path
) -> None:
    folder = make_idefics(tmp_path / "hf", FLAMINGO, torch.float32, spread=0.1)
    samples = documents(FLAMINGO, (2, 3, 1))
    image = samples[0].images[0]
    other = dataclasses.replace(
        samples[1], images=(samples[1].images[0], image, *samples[1].images[2:])
    )
    answers = []
    for name, changed in (("one", samples[1]), ("two", other)):
        packs = tmp_path / name
        write_packs(packs, [[samples[0], changed, samples[2]]], capacity=96, **sizes_of(FLAMINGO))
        config = _config(FLAMINGO, packs, head_tokens="all")
        [(logits, _)] = ranks.run(answers_of_pack, 1, config, folder)
        answers.append(logits)
    differs = np.abs(answers[0] - answers[1]).max(axis=1) > 0
    start = samples[0].length
    place = start + int(np.flatnonzero(samples[1].tokens == CONTEXT)[1])
    assert np.flatnonzero(differs).tolist() == list(range(place, start + samples[1].length))


def test_frozen_parts_stay_bit_for_bit_with_weight_decay(ranks: Pool, packs: Path) -> None:
    settings = dict(weight_decay=0.1, decay="all")
    fresh, after = (
        whole_weights(ranks.run(train_curve, 1, _config(FLAMINGO, packs, steps=steps, **settings)))
        for steps in (0, 3)
    )
    changed = {key for key, weight in after.items() if not np.array_equal(weight, fresh[key])}
    own = ("connector.", "language.added_", "language.decoder.layers.0.cross.")
    own += ("language.decoder.layers.2.cross.",)
    assert changed == {key for key in after if key.startswith(own)}
    assert "language.decoder.layers.0.cross.attention_gate" in changed


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    assert_pack_equals_samples_alone(
        ranks,
        partial(_config, OPEN, trainable=EVERYTHING),
        documents(OPEN, (2, 0, 1, 3)),
        tmp_path,
        capacity=128,
        **sizes_of(OPEN),
    )
