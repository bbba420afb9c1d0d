"""Whatever the layout and the freeze mask, training is the same as in one process: losses and gradient norms, step for step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.samples import make_dataset
from tests.ranks.pool import Pool
from tests.ranks.runs import EVERYTHING, TINY, Curve, config_for, train_curve

STAGES = {"1": ("projector",), "1.5": ("vision", "projector"), "2": EVERYTHING, "0": ("language",)}
LAYOUTS = {
    "tp2": dict(tensor_model_parallel_size=2),
    "tp2 sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "dp2": dict(),
    "tp2 pp2, border in the vision encoder": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="v*2|v,p,t*3,h"),
    "pp4, two chunks of vision": dict(pipeline_model_parallel_size=4, layout="v|v*2|p,t|t*2,h"),
}
RANKS = {"dp2": 2, "tp2 pp2, border in the vision encoder": 4, "pp4, two chunks of vision": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    features = TINY.features_per_tile
    sizes = dict(vocab_size=TINY.language.vocab_size, context_token_id=7, tile_size=16, features_per_tile=features, capacity=128)
    make_dataset(folder, packs=12, samples_per_pack=4, image_share=0.6, **sizes)
    return folder


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> dict[str, Curve]:
    """The curves of one process, for every freeze mask."""
    return {
        stage: ranks.run(train_curve, 1, config_for(dataset, trainable=mask, drop_path=0.2 if "vision" in mask else 0.0))[0]
        for stage, mask in STAGES.items()
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_like_one_process(ranks: Pool, dataset: Path, alone: dict[str, Curve], layout: str, stage: str) -> None:
    mask = STAGES[stage]
    config = config_for(dataset, trainable=mask, drop_path=0.2 if "vision" in mask else 0.0, **LAYOUTS[layout])
    curve = ranks.run(train_curve, RANKS.get(layout, 2), config)[0]
    assert curve.losses == pytest.approx(alone[stage].losses, rel=1e-5)
    assert curve.grad_norms == pytest.approx(alone[stage].grad_norms, rel=1e-5)


def test_training_learns(alone: dict[str, Curve]) -> None:
    for curve in alone.values():
        assert curve.losses[-1] < curve.losses[0]
        assert all(norm > 0 for norm in curve.grad_norms)
