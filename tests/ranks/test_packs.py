"""Samples of a pack do not see each other, and packs without images train beside packs with
images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.data.samples import make_sample, write_packs
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY, build, config_for, train_curve

CAPACITY = 160
SIZES = dict(
    vocab_size=TINY.language.vocab_size,
    context_token_id=7,
    tile_size=16,
    features_per_tile=TINY.features_per_tile,
)


def _samples(images: tuple[int, ...], seed: int) -> list:
    rng = np.random.default_rng(seed)
    return [
        make_sample(rng, images=count, text_tokens=12 + 5 * n, line=n + 1, **SIZES)
        for n, count in enumerate(images)
    ]


def losses_and_gradients(config: Config) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Compute the losses of the supervised tokens of every pack, and the gradient of their sum."""
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    options = dataclasses.replace(job.batch_options, reduction="token")
    packs = [job.train.batch(pack, pack, options) for pack in range(len(job.train))]
    job.chunks[0].eval()
    with torch.no_grad():
        losses = [job.chunks[0](batch)[batch.loss_weights > 0].numpy() for batch in packs]
    job.ddp_chunks[0].zero_grad_buffer()
    run_packs(job.ddp_chunks, Microbatches(iter(packs), len(packs), 1.0), job.backend)
    gradients = {
        key: weight.main_grad.numpy().copy() for key, weight in named_weights(job.chunks[0]).items()
    }
    return losses, gradients


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path, recompute: str) -> None:
    samples = _samples((1, 0, 2, 1), seed=1)
    write_packs(tmp_path / "together", [samples], capacity=CAPACITY, **SIZES)
    write_packs(tmp_path / "alone", [[sample] for sample in samples], capacity=CAPACITY, **SIZES)
    [(together, gradients)] = ranks.run(
        losses_and_gradients, 1, config_for(tmp_path / "together", recompute=recompute)
    )
    [(alone, expected)] = ranks.run(
        losses_and_gradients, 1, config_for(tmp_path / "alone", recompute=recompute)
    )
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, expected[key], atol=1e-5 * np.abs(expected[key]).max() + 1e-7, err_msg=key
        )


@pytest.mark.parametrize("mask", [("connector",), ("vision", "connector"), EVERYTHING])
def test_a_pack_without_images_trains_beside_one_with_images(
    ranks: Pool, tmp_path: Path, mask: tuple[str, ...]
) -> None:
    packs = [
        _samples((1, 2), seed=2),
        _samples((0, 0, 0), seed=3),
        _samples((2, 0), seed=4),
        _samples((0,), seed=5),
    ]
    write_packs(tmp_path / "packs", packs, capacity=CAPACITY, alignment=4, **SIZES)
    # Rank 0 always has images and rank 1 never has, then neither has.
    order = (0, 1, 2, 3, 1, 3)
    settings = dict(trainable=mask, global_batch_size=2, steps=3)
    [alone] = ranks.run(train_curve, 1, config_for(tmp_path / "packs", **settings), order)
    pipeline = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")
    for layout in (
        dict(),
        pipeline,
        dict(tensor_model_parallel_size=2, vision="data"),
        dict(context_parallel_size=2),
    ):
        curve = ranks.run(
            train_curve, 2, config_for(tmp_path / "packs", **settings, **layout), order
        )[0]
        assert curve.losses == pytest.approx(alone.losses, rel=1e-5)
        assert curve.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_layers_train_the_same(ranks: Pool, tmp_path: Path, recompute: str) -> None:
    write_packs(
        tmp_path / "packs",
        [_samples((1, 0, 1), seed=s) for s in range(4)],
        capacity=CAPACITY,
        **SIZES,
    )
    # Only late layers are trained, so that the input of the recomputed layers is frozen.
    mask = ("vision.encoder.layers.2", "connector")
    [kept] = ranks.run(
        train_curve, 1, config_for(tmp_path / "packs", trainable=mask, drop_path=0.3, steps=3)
    )
    [recomputed] = ranks.run(
        train_curve,
        1,
        config_for(tmp_path / "packs", trainable=mask, drop_path=0.3, steps=3, recompute=recompute),
    )
    assert recomputed.losses == pytest.approx(kept.losses, rel=1e-6)
    assert recomputed.grad_norms == pytest.approx(kept.grad_norms, rel=1e-6)


def recomputed_layers(config: Config) -> dict[str, str | None]:
    """Return the recomputation that the layers of each part are configured with."""
    [chunk] = build(config).chunks
    return {
        "vision": chunk.vision.config.recompute_granularity,
        "language": chunk.language.config.recompute_granularity,
    }


def test_the_layers_of_one_part_can_be_recomputed_alone(ranks: Pool, tmp_path: Path) -> None:
    write_packs(
        tmp_path / "packs",
        [_samples((1, 0, 1), seed=s) for s in range(4)],
        capacity=CAPACITY,
        **SIZES,
    )
    whole = dict(vision=None, language=None)
    for part in whole:
        config = config_for(tmp_path / "packs", recompute="full", recompute_parts=(part,))
        assert ranks.run(recomputed_layers, 1, config) == [whole | {part: "full"}]


def test_bfloat16_trains_like_float32(ranks: Pool, tmp_path: Path) -> None:
    write_packs(
        tmp_path / "packs",
        [_samples((1, 0, 1), seed=s) for s in range(4)],
        capacity=CAPACITY,
        **SIZES,
    )
    [exact] = ranks.run(train_curve, 1, config_for(tmp_path / "packs", steps=5))
    settings = dict(steps=5, precision="bfloat16", tensor_model_parallel_size=2)
    half = ranks.run(train_curve, 2, config_for(tmp_path / "packs", **settings))[0]
    assert half.losses == pytest.approx(exact.losses, rel=2e-2)


def count_mismatch(config: Config) -> str:
    """Return the message of the error that the model raises for a pack with too few tiles."""
    job = build(config)
    batch = job.train.batch(0, 0, BatchOptions(vision_layers=3))
    broken = dataclasses.replace(
        batch, tiles=batch.tiles[:-1], drop_path_draws=batch.drop_path_draws[:, :-1]
    )
    try:
        job.chunks[0](broken)
    except ValueError as error:
        return str(error)
    return ""


def test_features_and_placeholders_must_be_equal_in_number(ranks: Pool, tmp_path: Path) -> None:
    write_packs(tmp_path / "packs", [_samples((2, 1), seed=1)], capacity=CAPACITY, **SIZES)
    tiles = int(sum(image.tiles for sample in _samples((2, 1), seed=1) for image in sample.images))
    [message] = ranks.run(count_mismatch, 1, config_for(tmp_path / "packs"))
    features = TINY.features_per_tile
    assert (
        f"{tiles * features} image placeholder tokens" in message
        and f"{(tiles - 1) * features} features" in message
    )


def strides_of_labels(config: Config) -> tuple[int, ...]:
    """Return the strides of the labels that a fused cross-entropy receives."""
    seen = []
    job = build(config)

    def cross_entropy(logits, labels, group):
        seen.append(labels.stride())
        return logits.float().logsumexp(-1)

    job.chunks[0].language.cross_entropy = cross_entropy
    job.chunks[0](job.train.batch(0, 0, BatchOptions(vision_layers=3)))
    return seen[0]


def test_labels_stand_one_behind_the_other(ranks: Pool, tmp_path: Path) -> None:
    write_packs(tmp_path / "packs", [_samples((1,), seed=1)], capacity=CAPACITY, **SIZES)
    assert ranks.run(strides_of_labels, 1, config_for(tmp_path / "packs")) == [(1, 1)], (
        "Transformer Engine's kernel steps by the last stride"
    )
