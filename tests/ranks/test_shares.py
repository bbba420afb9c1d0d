"""Weights of which several ranks have copies: saved once, and with gradients over everybody's
tiles.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.ranks.pool import Pool
from tests.ranks.runs import build, config_for, make_packs

LAYOUT = dict(tensor_model_parallel_size=2, context_parallel_size=2, vision="data")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=4, image_share=1.0, alignment=4)
    return folder


def saved_shards(config: Config) -> list[tuple[str, tuple[int, ...]]]:
    """List the shards that this rank would write to a checkpoint."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megavlm.model import weights

    shards = (shard for chunk in build(config).chunks for shard in weights._shards(chunk))
    return [
        (shard.key, tuple(shard.global_offset))
        for shard in shards
        if is_main_replica(shard.replica_id)
    ]


def test_every_shard_is_saved_by_one_rank(ranks: Pool, dataset: Path) -> None:
    saved = Counter(
        shard
        for shards in ranks.run(saved_shards, 4, config_for(dataset, **LAYOUT))
        for shard in shards
    )
    assert set(saved.values()) == {1}
    parts = Counter(key for key, _ in saved)
    assert (
        parts["vision.encoder.layers.0.mlp.linear_fc1.weight"]
        == parts["connector.mlp.linear_fc1.weight"]
        == 1
    )
    assert parts["language.decoder.layers.0.mlp.linear_fc2.weight"] == 2


def gradients(config: Config) -> dict[str, np.ndarray]:
    """Gradients of one step over the whole dataset, of the weights that this rank holds whole."""
    from megavlm.model.weights import named_weights
    from megavlm.train.microbatches import Microbatches
    from megavlm.train.step import run_packs

    job = build(config)
    packs = [
        job.train.batch(pack, pack, BatchOptions(vision_layers=3, rank_slice=job.groups.rank_slice))
        for pack in range(len(job.train))
    ]
    job.ddp_chunks[0].zero_grad_buffer()
    run_packs(job.ddp_chunks, Microbatches(iter(packs), len(packs), 1.0), job.backend)
    # With a single data-parallel rank all gradients are there; with several, each holds its share
    # of the sum.
    weights = named_weights(job.chunks[0])
    return {
        key: weight.main_grad.numpy().copy()
        for key, weight in weights.items()
        if not key.startswith("language.")
    }


def test_gradients_are_those_of_one_process(ranks: Pool, dataset: Path) -> None:
    settings = dict(drop_path=0.3, overlap_grad_reduce=False)
    [alone] = ranks.run(gradients, 1, config_for(dataset, **settings))
    shared = ranks.run(
        gradients, 2, config_for(dataset, **settings, tensor_model_parallel_size=2, vision="data")
    )
    for key, gradient in alone.items():
        for copy in shared:
            np.testing.assert_allclose(
                copy[key], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max() + 1e-7, err_msg=key
            )
