"""A model with a Q-Former, trained behind a frozen vision encoder, before a frozen language
model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megavlm.config.connectors import Connector
from megavlm.config.qformer import QFormer
from megavlm.config.schema import Config
from megavlm.planner.parameter_table import parameter_keys
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, config_for, make_packs, train_curve, whole_weights

QFORMER = QFormer(
    queries=5, num_layers=3, hidden_size=24, ffn_hidden_size=40, num_attention_heads=3
)
ARCHITECTURE = dataclasses.replace(TINY, connector=Connector(kind="qformer", qformer=QFORMER))
STAGES = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="v*2|v,c,t*3,h")
LAYOUTS = {
    "tensor and pipeline": (4, STAGES),
    "tiles shared, data": (4, dict(tensor_model_parallel_size=2, vision="data")),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    make_packs(folder, features_per_tile=QFORMER.queries)
    return folder


def run_of(packs: Path, **settings) -> Config:
    usual = dict(trainable=("connector",), steps=4)
    config = config_for(packs, **usual | settings)
    return dataclasses.replace(config, architecture=ARCHITECTURE)


@pytest.fixture(scope="module")
def one_process(ranks: Pool, packs: Path) -> Curve:
    return ranks.run(train_curve, 1, run_of(packs))[0]


def _without_key_bias(key: str, weight: np.ndarray) -> np.ndarray:
    """Leave out what has a gradient of zero, since softmax does not see it: Adam divides noise by
    noise there.
    """
    width = QFORMER.hidden_size
    if key.startswith("connector.") and key.endswith("attention.qkv.bias"):
        return np.concatenate([weight[:width], weight[2 * width :]])
    return weight[width:] if key.endswith("cross_attention.key_value.bias") else weight


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_trains_like_one_process(
    ranks: Pool, packs: Path, one_process: Curve, name: str
) -> None:
    count, layout = LAYOUTS[name]
    curves = ranks.run(train_curve, count, run_of(packs, **layout))
    assert curves[0].losses == pytest.approx(one_process.losses, rel=1e-5)
    assert curves[0].grad_norms == pytest.approx(one_process.grad_norms, rel=1e-5)
    before = whole_weights([one_process])
    after = whole_weights(curves)
    assert before.keys() == after.keys()
    for key, weight in before.items():
        same = _without_key_bias(key, after[key])
        assert same == pytest.approx(_without_key_bias(key, weight), rel=1e-4, abs=1e-5), key


def test_the_connector_alone_is_trained_with_its_norm(
    ranks: Pool, packs: Path, one_process: Curve
) -> None:
    fresh = whole_weights(ranks.run(train_curve, 1, run_of(packs, steps=0)))
    after = whole_weights([one_process])
    assert set(after) == set(parameter_keys(run_of(packs)))
    changed = {key for key, weight in after.items() if (weight != fresh[key]).any()}
    assert changed == {key for key in after if key.startswith("connector.")}
