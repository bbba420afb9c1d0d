"""What decays, and what clipping does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config.schema import Config
from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, build, config_for, train_curve


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    sizes = dict(vocab_size=199, context_token_id=7, tile_size=16, features_per_tile=TINY.features_per_tile, capacity=128)
    make_dataset(folder, packs=4, samples_per_pack=4, image_share=1.0, **sizes)
    return folder


def decay_factors(config: Config) -> dict[str, float]:
    """By how much one update with a gradient of zero scales each trained weight that starts at a known value."""
    import torch

    from megavlm.model.weights import named_weights
    from megavlm.train.optimizer import set_rates

    job = build(config)
    weights = {key: weight for key, weight in named_weights(job.model).items() if weight.requires_grad}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    job.wrapped.zero_grad_buffer()
    job.optimizer.zero_grad()
    set_rates(job.optimizer, config, 1)
    job.optimizer.step()
    kept = {key: float(weight.norm() / before[key].norm()) for key, weight in weights.items() if before[key].any()}
    assert torch.isfinite(torch.tensor(list(kept.values()))).all()
    return kept


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_weight_decay_reaches_what_it_is_asked_to(ranks: Pool, dataset: Path, decay: str) -> None:
    settings = dict(lr=0.1, weight_decay=0.5, warmup_steps=1, warmup_ratio=0.0, decay=decay, schedule="constant")
    [factors] = ranks.run(decay_factors, 1, config_for(dataset, **settings))
    assert len(factors) > 40
    for key, factor in factors.items():
        is_vector = key.endswith(("norm.weight", "norm_weight", "layernorm.weight", "scale", "class_token"))
        assert factor == pytest.approx(1.0 if decay == "matrices" and is_vector else 0.95, rel=1e-5), key


def test_the_norm_is_told_as_it_was_before_clipping(ranks: Pool, dataset: Path) -> None:
    [clipped] = ranks.run(train_curve, 1, config_for(dataset, clip_grad=0.01, steps=2))
    [free] = ranks.run(train_curve, 1, config_for(dataset, clip_grad=0.0, steps=2))
    assert clipped.grad_norms[0] == pytest.approx(free.grad_norms[0], rel=1e-5) and free.grad_norms[0] > 0.01
