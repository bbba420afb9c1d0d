"""GPT-OSS: sinks, windows, YaRN and experts with biases train at every layout as in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.schema import Config, Experts
from megavlm.planner.flops import pieces
from tests.convert.models import GPT_OSS
from tests.data.samples import make_dataset
from tests.ranks.layouts import MASKS, asks_for_all
from tests.ranks.model_checks import assert_pack_equals_samples_alone, sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, build, config_for, train_curve
from tests.ranks.test_experts import LOSSES, Layout, assert_trains_alike, trained_alone
from tests.ranks.test_packs import _samples
from tests.ranks.test_resume import LAST, forget_the_end, make_job, run_job, saved_tensors

SINKS = "language.decoder.layers.*.self_attention.core_attention"
MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=2),
    language=dataclasses.replace(
        TINY.language,
        **GPT_OSS | dict(num_experts=4, experts_per_token=2),
        kv_channels=14,
        num_layers=2,
    ),
)
LAYOUTS = (
    Layout(tensor=2, everyday=("2",)),
    Layout(pipeline=2, everyday=("2",)),
    Layout(expert=2, data=2, everyday=("2",)),
    Layout(context=2, everyday=("2",)),
    Layout(data=2),
    Layout(expert=2, tensor=2),
    Layout(expert=2, tensor=2, pipeline=2),
    Layout(expert=4, tensor=2, data=2),
    Layout(tensor=4),
    Layout(pipeline=2, virtual=2),
    Layout(expert=2, context=2, tensor=2, pipeline=2),
    Layout(expert=2, data=2, other=(("recompute", "full"),)),
    Layout(expert=2, data=2, other=(("recompute", "selective"),)),
)
ALL_MASKS = MASKS | {"sinks": (SINKS,)}
CASES = [
    (layout, mask)
    for layout in LAYOUTS
    for mask in ALL_MASKS
    if mask in layout.everyday or asks_for_all()
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_dataset(folder, packs=12, capacity=128, alignment=8, **sizes_of(MODEL))
    return folder


def configure(dataset: Path, **settings) -> Config:
    config = config_for(dataset, adam_eps=1e-3, **settings)
    losses = (
        LOSSES
        if any(
            "router" in one or one == "language" for one in settings.get("trainable", ("language",))
        )
        else Experts()
    )
    return dataclasses.replace(config, architecture=MODEL, experts=losses)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[str], Curve]:
    return trained_alone(ranks, lambda mask: configure(dataset, trainable=ALL_MASKS[mask], steps=3))


@pytest.mark.parametrize(("layout", "mask"), CASES, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Callable[[str], Curve], layout: Layout, mask: str
) -> None:
    config = configure(dataset, trainable=ALL_MASKS[mask], steps=3, **layout.settings)
    assert_trains_alike(ranks, layout, config, alone(mask))


def test_a_router_whose_bias_alone_is_trained_has_its_losses(ranks: Pool, dataset: Path) -> None:
    config = configure(dataset, trainable=("language.*.router.bias",), steps=1)
    norms = {
        ranks.run(train_curve, 1, dataclasses.replace(config, experts=losses))[0].grad_norms[0]
        for losses in (LOSSES, Experts(balance_loss=0.0))
    }
    assert len(norms) == 2


def test_a_pack_equals_its_samples_alone(ranks: Pool, tmp_path: Path) -> None:
    samples = _samples((1, 0, 2, 1), seed=1)
    sizes = dict(capacity=160, **sizes_of(MODEL))
    model = dataclasses.replace(MODEL, vision=TINY.vision)

    def config(packs: Path) -> Config:
        return dataclasses.replace(config_for(packs), architecture=model)

    assert_pack_equals_samples_alone(ranks, config, samples, tmp_path, **sizes)


def test_a_run_resumes_bit_for_bit_at_its_layout_and_closely_at_another(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    def job(name: str, layout: Layout) -> Config:
        settings = dict(global_batch_size=4, drop_path=0.0, adam_eps=1e-3) | layout.settings
        made = make_job(dataset, tmp_path / name, **settings)
        return dataclasses.replace(made, architecture=MODEL, experts=LOSSES)

    layout = Layout(expert=2, pipeline=2, data=2)
    ranks.run(run_job, 4, job("whole", layout))
    [whole] = ranks.run(saved_tensors, 1, tmp_path / "whole" / LAST)
    assert len([key for key in whole if "layers.1" in key and "softmax_offset" in key]) == 4
    for name, other in (("same", layout), ("other", Layout(tensor=2))):
        forget_the_end(tmp_path / "whole", tmp_path / name)
        ranks.run(run_job, other.ranks, job(name, other))
        [found] = ranks.run(saved_tensors, 1, tmp_path / name / LAST)
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            if name == "same":
                assert torch.equal(tensor, whole[key]), key
            limit = 1e-5 * whole[key].abs().max()
            np.testing.assert_allclose(tensor, whole[key], rtol=1e-4, atol=limit, err_msg=key)


def sizes_by_key(config: Config) -> dict[str, int]:
    """Return the size of each weight of a model that is built."""
    from megavlm.model.weights import weight_sizes

    return weight_sizes(build(config).chunks[0])


def test_the_planner_counts_the_weights_that_are_built(ranks: Pool, dataset: Path) -> None:
    assert MODEL.language.vocab_size % 128, "rows are added, and not counted"
    [built] = ranks.run(sizes_by_key, 1, configure(dataset))
    assert built == {piece.key: piece.elements for piece in pieces(MODEL) if piece.elements}
