"""Which ranks read which weights of what a run starts from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megavlm.config.schema import Config
from tests.ranks.pool import Pool
from tests.ranks.runs import make_packs
from tests.ranks.test_master_weights import wide_job


def fill_counted(config: Config) -> tuple[dict[str, int], bool]:
    """Fill a model; return how many numbers the tensors have that this rank asked for, and whether
    the model has what it would have if this rank had asked for all.
    """
    from megavlm.model import weights
    from tests.ranks.runs import build

    job = build(config)
    fresh = weights.fresh_tensor(config)
    right = {
        key: tensor.clone()
        for chunk in job.chunks
        for key, tensor in weights.named_weights(chunk).items()
    }
    for tensor in (one for chunk in job.chunks for one in chunk.parameters()):
        tensor.data.fill_(torch.nan)
    taken: dict[str, int] = {}

    def counted(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        taken[key] = taken.get(key, 0) + math.prod(shape)
        return fresh(key, shape)

    weights.fill(job.chunks, counted)
    now = {
        key: tensor for chunk in job.chunks for key, tensor in weights.named_weights(chunk).items()
    }
    return taken, all(torch.equal(now[key], right[key]) for key in right)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=12, image_share=0.6, alignment=4)
    return folder


def test_replicas_take_a_share_of_the_weights_each(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    [(whole, is_right)] = ranks.run(fill_counted, 1, wide_job(dataset, tmp_path))
    assert is_right
    found = ranks.run(fill_counted, 3, wide_job(dataset, tmp_path))
    assert all(is_right for _, is_right in found)
    total = sum(whole.values())
    assert sum(sum(taken.values()) for taken, _ in found) == total
    assert max(sum(taken.values()) for taken, _ in found) < 1.1 * total / 3


def test_tensor_parallel_ranks_ask_for_what_they_share(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    [(whole, _)] = ranks.run(fill_counted, 1, wide_job(dataset, tmp_path))
    job = wide_job(dataset, tmp_path, tensor_model_parallel_size=2, global_batch_size=2)
    found = ranks.run(fill_counted, 4, job)
    assert all(is_right for _, is_right in found)
    for key, size in whole.items():
        assert sum(taken.get(key, 0) for taken, _ in found) == 2 * size, key


def fill_from_a_bad_disk(config: Config) -> str:
    """Fill a model from tensors of which one cannot be read; return what is raised."""
    from megavlm.checkpoint.rank_errors import RankError
    from megavlm.model import weights
    from tests.ranks.runs import build

    job = build(config)
    fresh = weights.fresh_tensor(config)

    def read(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        if key == "connector.norm.weight":
            raise OSError("model.safetensors: Input/output error")
        return fresh(key, shape)

    try:
        weights.fill(job.chunks, read)
    except RankError as error:
        return str(error)
    return ""


def test_a_file_that_one_rank_cannot_read_ends_all(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    texts = ranks.run(fill_from_a_bad_disk, 3, wide_job(dataset, tmp_path))
    assert len(set(texts)) == 1
    assert "OSError: model.safetensors: Input/output error" in texts[0]
