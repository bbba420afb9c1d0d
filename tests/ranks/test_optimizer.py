"""What decays, what clipping does, and how updates travel."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, Curve, build, config_for, make_packs, train_curve


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=4, image_share=1.0)
    return folder


def decay_factors(config: Config) -> dict[str, float]:
    """By how much one update with a gradient of zero scales each trained weight that starts at a
    known value.
    """
    import torch

    from megavlm.model.weights import named_weights
    from megavlm.train.optimizer import prepare_gradient, set_rates, update_weights

    job = build(config)
    weights = {
        key: weight for key, weight in named_weights(job.chunks[0]).items() if weight.requires_grad
    }
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    job.ddp_chunks[0].zero_grad_buffer()
    job.optimizer.zero_grad()
    set_rates(job.optimizer, config, 1)
    update_weights(
        job.optimizer,
        prepare_gradient(job.optimizer, job.part_norms.sums, job.backend.device),
        config.optimizer.clip_grad,
    )
    kept = {
        key: float(weight.norm() / before[key].norm())
        for key, weight in weights.items()
        if before[key].any()
    }
    assert torch.isfinite(torch.tensor(list(kept.values()))).all()
    return kept


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_weight_decay_reaches_what_it_is_asked_to(ranks: Pool, dataset: Path, decay: str) -> None:
    settings = dict(
        lr=0.1, weight_decay=0.5, warmup_steps=1, warmup_ratio=0.0, decay=decay, schedule="constant"
    )
    [factors] = ranks.run(decay_factors, 1, config_for(dataset, **settings))
    assert len(factors) > 40
    for key, factor in factors.items():
        is_vector = key.endswith(
            ("norm.weight", "norm_weight", "layernorm.weight", "scale", "class_token")
        )
        assert factor == pytest.approx(
            1.0 if decay == "matrices" and is_vector else 0.95, rel=1e-5
        ), key


def weights_after_a_step(
    config: Config, *, by_megatron_core: bool
) -> tuple[dict[str, np.ndarray], float]:
    """Run an update that clips; return this rank's weights and the norm before clipping."""
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.optimizer import (
        prepare_gradient,
        set_rates,
        update_weights,
        whole_weights,
    )
    from megavlm.train.step import run_packs

    job = build(config)
    job.ddp_chunks[0].zero_grad_buffer()
    set_rates(job.optimizer, config, 1)
    pack = job.groups.data_rank
    batch = job.train.batch(pack, pack, BatchOptions(vision_layers=3))
    run_packs(job.ddp_chunks, Microbatches(iter([batch]), 1, 1.0), job.backend)
    clip = config.optimizer.clip_grad
    if by_megatron_core:
        norm = job.optimizer.step()[1]
    else:
        gradient = prepare_gradient(job.optimizer, job.part_norms.sums, job.backend.device)
        norm = gradient.norm
        update_weights(job.optimizer, gradient, clip)
    with whole_weights(job.ddp_chunks):
        return {
            key: weight.detach().numpy().copy()
            for key, weight in named_weights(job.chunks[0]).items()
        }, float(norm)


@pytest.mark.parametrize(
    "layout", [dict(), dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)]
)
@pytest.mark.parametrize("trainable", [EVERYTHING, ("connector",)])
def test_an_update_is_that_of_megatron_core(
    ranks: Pool, dataset: Path, layout: dict[str, int], trainable: tuple[str, ...]
) -> None:
    config = config_for(dataset, clip_grad=0.01, trainable=trainable, **layout)
    ours = ranks.run(partial(weights_after_a_step, by_megatron_core=False), 2, config)
    theirs = ranks.run(partial(weights_after_a_step, by_megatron_core=True), 2, config)
    for (weights, norm), (expected, expected_norm) in zip(ours, theirs, strict=True):
        assert norm == pytest.approx(expected_norm, rel=1e-6) and norm > 0.01
        for key, weight in weights.items():
            np.testing.assert_allclose(weight, expected[key], rtol=1e-5, atol=1e-7, err_msg=key)


def curve_with_small_buckets(config: Config) -> Curve:
    """Train with gradients reduced, and weights gathered, in many buckets, as a large model
    does.
    """
    from unittest import mock

    from megavlm.train import optimizer

    small = partial(optimizer.DistributedDataParallelConfig, bucket_size=5000)
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", small):
        return train_curve(config)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Curve:
    """Train in one process."""
    return ranks.run(train_curve, 1, config_for(dataset, steps=4, drop_path=0.2))[0]


@pytest.mark.parametrize(
    "overlap", [dict(), dict(overlap_grad_reduce=False), dict(overlap_param_gather=False)]
)
def test_communication_beside_computation_changes_nothing(
    ranks: Pool, dataset: Path, alone: Curve, overlap: dict[str, bool]
) -> None:
    config = config_for(dataset, steps=4, drop_path=0.2, **overlap)
    shared = ranks.run(curve_with_small_buckets, 2, config)[0]
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)
    assert shared.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)


def test_patches_are_embedded_with_the_weights_that_were_gathered(
    ranks: Pool, dataset: Path
) -> None:
    """No other weight of the vision encoder waits for them here."""
    config = config_for(dataset, trainable=("vision.patch_embedding", "connector"), steps=4)
    [alone] = ranks.run(train_curve, 1, config)
    shared = ranks.run(train_curve, 2, config)[0]
    assert shared.losses == pytest.approx(alone.losses, rel=1e-5)


def waiting_modules(config: Config) -> tuple[set[str], ...]:
    """Return which modules own trained weights, and which wait for gathered weights at the start,
    while weights are whole, and later.
    """
    from megavlm.train.optimizer import whole_weights

    job = build(config)
    [chunk] = job.ddp_chunks
    names = {module: name for name, module in chunk.module.named_modules()}

    def waiting() -> set[str]:
        handles = chunk.remove_forward_pre_hook_handles
        return {names[m] for m, handle in handles.items() if handle.id in m._forward_pre_hooks}

    trained = [name for name, weight in chunk.module.named_parameters() if weight.requires_grad]
    before = waiting()
    with whole_weights(job.ddp_chunks):
        inside = waiting()
    return {name.rpartition(".")[0] for name in trained}, before, inside, waiting()


def test_modules_wait_for_gathered_weights_if_they_own_some(ranks: Pool, dataset: Path) -> None:
    config = config_for(dataset, trainable=("vision", "connector"))
    (owners, before, inside, after) = ranks.run(waiting_modules, 2, config)[0]
    assert owners and before == owners and after == owners
    assert not inside


def test_the_norm_is_told_as_it_was_before_clipping(ranks: Pool, dataset: Path) -> None:
    [clipped] = ranks.run(train_curve, 1, config_for(dataset, clip_grad=0.01, steps=2))
    [free] = ranks.run(train_curve, 1, config_for(dataset, clip_grad=0.0, steps=2))
    assert (
        clipped.grad_norms[0] == pytest.approx(free.grad_norms[0], rel=1e-5)
        and free.grad_norms[0] > 0.01
    )
