"""Which rank holds which tensors of the optimizer's state while it is saved or loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megavlm.config.averages import Ema
from megavlm.config.schema import Config
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_master_weights import wide_job
from tests.ranks.test_resume import STEPS, forget_the_end, losses, run_job, saved_tensors

# Smaller than most buckets and some tensors, and a divisor of none.
_SMALL_PIECE = 20000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=12, image_share=0.6, alignment=4)
    return folder


def owned(config: Config, what: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of the tensors that this rank has of the optimizer's state, by key, while
    it is saved or loaded, and how many elements its model has.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedBase

    from megavlm.train import checkpoint
    from tests.ranks.runs import build

    job = build(config)
    of_job = (job.chunks, job.optimizer, config.fp8)
    state = checkpoint.sharded(*of_job, is_loading=True)  # moments, too, which a step would make
    if what == "saving":
        state = checkpoint.sharded(*of_job, is_loading=False)
    entries = [one for one in nested_values(state["optimizer"]) if isinstance(one, ShardedBase)]
    weights = sum(one.numel() for chunk in job.chunks for one in chunk.parameters())
    return {one.key: tuple(one.data.shape) for one in entries}, weights


@pytest.mark.parametrize("what", ["saving", "loading"])
def test_each_data_parallel_rank_holds_its_share_and_no_two_the_same(
    ranks: Pool, dataset: Path, tmp_path: Path, what: str
) -> None:
    found = ranks.run(owned, 3, wide_job(dataset, tmp_path), what)
    keys = [key for tensors, _ in found for key in tensors]
    assert len(keys) == len(set(keys))
    held = [sum(int(np.prod(shape)) for shape in tensors.values()) for tensors, _ in found]
    [weights] = {weights for _, weights in found}
    assert sum(held) == 3 * weights
    assert max(held) < 1.1 * weights


def run_in_small_pieces(config: Config) -> int:
    from megavlm.train import optimizer_state

    with mock.patch.object(optimizer_state, "_PIECE", _SMALL_PIECE):
        return run_job(config)


def test_pieces_make_the_same_checkpoint_and_the_same_run(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    half = dict(precision="bfloat16")
    ranks.run(run_job, 3, wide_job(dataset, tmp_path / "whole", **half))
    forget_the_end(tmp_path / "whole", tmp_path / "pieces")
    ranks.run(run_in_small_pieces, 3, wide_job(dataset, tmp_path / "pieces", **half))
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")[3:]
    name = f"step_{STEPS:08d}"
    [whole] = ranks.run(saved_tensors, 1, tmp_path / "whole" / name)
    [pieces] = ranks.run(saved_tensors, 1, tmp_path / "pieces" / name)
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


def test_data_parallel_ranks_write_as_much_each(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    ranks.run(run_job, 3, wide_job(dataset, tmp_path))
    files = (tmp_path / f"step_{STEPS:08d}" / "shards").glob("*.distcp")
    sizes = {"0": 0, "1": 0, "2": 0}
    for path in files:
        sizes[path.name.split("_")[2]] += path.stat().st_size
    assert max(sizes.values()) < 1.1 * sum(sizes.values()) / 3


def keys_read_at_a_resume(config: Config) -> tuple[list[str], list[str]]:
    """Run a job on, and return the keys of weights and of the optimizer that this rank reads."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    read: list[str] = []
    load = TorchDistLoadShardedStrategy.load

    def counted(self: Any, entries: dict[str, Any], *rest: Any) -> dict[str, Any]:
        read.extend(entry.key for entry in entries.values())
        return load(self, entries, *rest)

    with mock.patch.object(TorchDistLoadShardedStrategy, "load", counted):
        run_job(config)
    weights = [key for key in read if key.startswith("model.")]
    return weights, [key for key in read if not key.startswith("model.")]


def test_replicas_read_each_weight_and_each_moment_once(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ema = dataclasses.replace(wide_job(dataset, tmp_path), ema=Ema(decay=0.9))
    ranks.run(run_job, 3, ema)
    kept = tmp_path / "killed"
    forget_the_end(tmp_path, kept)
    job = dataclasses.replace(ema, checkpoint=dataclasses.replace(ema.checkpoint, save=str(kept)))
    found = ranks.run(keys_read_at_a_resume, 3, job)
    # The weights are read to fill the model, and with its optimizer.
    weights = [key for keys, _ in found for key in keys]
    assert all(keys for keys, _ in found) and weights.count("model.vision.position_embeddings") <= 2
    assert len(weights) <= 2.2 * len(set(weights))
    states = [key for _, keys in found for key in keys]
    names = {key.rpartition("model.")[0] for key in states}
    expected = {f"optimizer.state.{name}." for name in ("param", "exp_avg", "exp_avg_sq")}
    assert names == expected | {"ema."}
    # Stacks of experts and gates are read in two pieces.
    assert len(states) < 1.1 * len(set(states))


def test_ranks_that_own_nothing_save_and_resume_with_the_others(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    few = dict(trainable=("connector.mlp.linear_fc2",), precision="bfloat16")
    whole = dataclasses.replace(wide_job(dataset, tmp_path / "whole", **few), ema=Ema(decay=0.9))
    ranks.run(run_job, 3, whole)
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    killed = dataclasses.replace(wide_job(dataset, tmp_path / "killed", **few), ema=Ema(decay=0.9))
    ranks.run(run_job, 3, killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[3:]
    name = f"step_{STEPS:08d}"
    [before] = ranks.run(saved_tensors, 1, tmp_path / "whole" / name)
    [after] = ranks.run(saved_tensors, 1, tmp_path / "killed" / name)
    assert sum(key.startswith("optimizer.state.param.") for key in before) < 3
    assert all(torch.equal(before[key], after[key]) for key in before)
