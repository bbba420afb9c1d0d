"""Biases trained beside frozen weights get the gradients that they have in full training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs, train_curve, whole_weights

SP = dict(tensor_model_parallel_size=2, sequence_parallel=True, recompute="selective")
# One update in proportion to the gradient.
SETTINGS = dict(steps=1, lr=1e-2, adam_eps=1e3, clip_grad=0.0, warmup_ratio=0.0, weight_decay=0.0)
SETTINGS |= dict(schedule="constant")


@pytest.mark.parametrize("layout", [{}, SP])
def test_a_bias_has_its_gradient_beside_a_frozen_weight(
    ranks: Pool, tmp_path: Path, layout: dict
) -> None:
    make_packs(tmp_path / "train", packs=4, image_share=0.8, alignment=4)

    def weights(**settings: object) -> dict[str, np.ndarray]:
        config = config_for(tmp_path / "train", **SETTINGS | layout | settings)
        return whole_weights(
            ranks.run(train_curve, config.parallel.tensor_model_parallel_size, config)
        )

    mask = ("*.bias",)
    start = weights(trainable=mask, lr=1e-30)
    everything = weights()
    for key, weight in weights(trainable=mask).items():
        if key.endswith(".bias"):
            update = everything[key] - start[key]
            assert np.abs(update).max() > 0, key
            np.testing.assert_allclose(weight - start[key], update, 1e-3, 1e-9, err_msg=key)
        else:
            assert np.array_equal(weight, start[key]), key
