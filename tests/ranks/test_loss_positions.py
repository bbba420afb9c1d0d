"""Head and loss on supervised tokens alone train as head and loss on all tokens do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from megavlm.data.loading.dataset import PackedDataset, loss_positions
from megavlm.data.store.pack_format import REDUCTIONS
from megavlm.planner.activations import activation_memory
from megavlm.planner.layout import make_layout
from megavlm.planner.rank_load import RankLoad
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, make_packs, train_curve, whole_weights

CAPACITY = 320
TIED = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, tied_head=True))
# Settings, ranks, and how losses are reduced.
CASES = {
    "alone": ({}, 1, REDUCTIONS),
    "TP2": (dict(tensor_model_parallel_size=2), 2, ("square",)),
    "TP2 SP": (dict(tensor_model_parallel_size=2, sequence_parallel=True), 2, ("token",)),
    "PP2": (dict(pipeline_model_parallel_size=2), 2, ("sample",)),
    "CP2": (dict(context_parallel_size=2), 2, ("square",)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(
        folder,
        packs=8,
        samples_per_pack=5,
        image_share=0.6,
        alignment=4,
        capacity=CAPACITY,
        text_tokens=(10, 30),
    )
    packs = PackedDataset(folder)
    shares = [len(packs.batch(pack, 0).loss_positions) / CAPACITY for pack in range(len(packs))]
    assert max(shares) < 0.6, "most tokens have no loss"
    return folder


def test_every_position_with_a_loss_is_chosen_and_few_others() -> None:
    rng = np.random.default_rng(0)
    for tokens, fraction in ((16384, 0.25), (16384, 0.0), (256, 0.3), (256, 1.0), (7, 0.5)):
        weights = np.where(rng.random(tokens) < fraction, 0.5, 0).astype(np.float32)
        chosen = loss_positions(weights)
        assert (np.diff(chosen) > 0).all() and chosen.dtype == np.int64
        assert set(np.flatnonzero(weights)) <= set(chosen.tolist())
        assert 1 <= len(chosen) <= (weights > 0).sum() + 128
        assert len(chosen) == tokens or tokens < 16 or len(chosen) % min(128, tokens // 16) == 0


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_as_with_the_head_on_all_tokens(
    ranks: Pool, dataset: Path, name: str
) -> None:
    settings, world, reductions = CASES[name]
    for reduction in reductions:
        curves = {
            tokens: ranks.run(train_curve, world, run(dataset, reduction, tokens, **settings))
            for tokens in ("all", "supervised")
        }
        one, other = (curves[tokens][0] for tokens in ("all", "supervised"))
        assert other.losses == pytest.approx(one.losses, rel=1e-6)
        assert other.grad_norms == pytest.approx(one.grad_norms, rel=1e-6)
        weights = whole_weights(curves["all"])
        for key, weight in whole_weights(curves["supervised"]).items():
            np.testing.assert_allclose(weight, weights[key], rtol=1e-6, atol=1e-6, err_msg=key)


def run(dataset: Path, reduction: str, tokens: str, **settings) -> Config:
    """Three steps of two packs; Adam's eps is large, so that it does not blow up the last bits of
    gradients.
    """
    settings = dict(global_batch_size=2, adam_eps=1e-3, clip_grad=0.0) | settings
    config = config_for(dataset, steps=3, head_tokens=tokens, **settings)
    arch = TIED if "pipeline_model_parallel_size" in settings else TINY
    data = dataclasses.replace(config.data, loss_reduction=reduction)
    return dataclasses.replace(config, architecture=arch, data=data)


def peak_of_logits(config: Config) -> int:
    """Return the most bytes of tensors as wide as the vocabulary that a step has at one time."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    batch = job.train.batch(0, 0, BatchOptions(vision_layers=config.architecture.vision.num_layers))
    width = job.chunks[0].language.output_layer.weight.shape[0]
    sizes: dict[StorageWeakRef, int] = {}
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (width,):
                storage = result.untyped_storage()
                sizes[StorageWeakRef(storage)] = storage.nbytes()
                for gone in [one for one in sizes if one.expired()]:
                    del sizes[gone]
                most = max(most, sum(sizes.values()))
            return result

    with Watch():
        run_packs(job.ddp_chunks, Microbatches(iter([batch]), 1, batch.weight_sum), job.backend)
    return most


def test_logits_take_the_memory_that_is_estimated(ranks: Pool, dataset: Path) -> None:
    positions = len(PackedDataset(dataset).batch(0, 0).loss_positions)
    measured = {}
    estimated = {}
    for tokens, rows in (("all", CAPACITY), ("supervised", positions)):
        config = run(dataset, "square", tokens)
        [measured[tokens]] = ranks.run(peak_of_logits, 1, config)
        load = RankLoad(tokens=float(CAPACITY), tiles=4.0, supervised=float(rows))
        estimated[tokens] = activation_memory(config, make_layout(config).chunks[-1], load).once
    # Other tensors of that width are the same in both; the vocabulary of 199 is padded to 256.
    saved = measured["all"] - measured["supervised"]
    assert saved == pytest.approx(
        (estimated["all"] - estimated["supervised"]) * 256 / 199, rel=0.02
    )
