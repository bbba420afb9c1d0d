"""A mixture of experts: training at every layout is that of one process, padding is routed nowhere,
and an expert may get no token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavlm.config.schema import Architecture, Config, Experts
from tests.convert.models import EXPERTS
from tests.data.samples import make_dataset
from tests.ranks.layouts import LIMIT, MASKS, asks_for_all
from tests.ranks.model_checks import sizes_of
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, build, config_for, train_curve
from tests.ranks.test_layouts import compare

# Four layers, so that a pipeline can have two chunks on each of two ranks.
MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=2),
    language=dataclasses.replace(
        TINY.language,
        **EXPERTS | dict(num_experts=8, experts_per_token=3, expert_ffn_hidden_size=24),
        num_layers=2,
    ),
)
# Heavy, so that a wrong gradient of them would show.
LOSSES = Experts(balance_loss=0.3, router_z_loss=0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout with experts.

    Args:
        expert: expert-parallel ranks.
        tensor, pipeline, context, data, virtual: sizes of the other axes.
        other: other settings.
        everyday: masks that it is tried with when not all of the matrix is asked for.
    """

    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    virtual: int = 1
    other: tuple[tuple[str, Any], ...] = ()
    everyday: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the run."""
        chunks = self.pipeline * self.virtual
        return dict(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self.virtual,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
            sequence_parallel=self.tensor > 1,
            layout={1: "auto", 2: "v*2,t|t", 4: "v|v|t|t"}[chunks],
            **dict(self.other),
        )

    def __str__(self) -> str:
        sizes = dict(EP=self.expert, TP=self.tensor, PP=self.pipeline, CP=self.context)
        sizes |= dict(DP=self.data, V=self.virtual)
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join([*words, *(f"{name} {value}" for name, value in self.other)])


LAYOUTS = (
    Layout(data=2),
    Layout(expert=2, data=2, everyday=("2",)),
    Layout(expert=2, data=2, other=(("dispatcher", "allgather"),), everyday=("2",)),
    Layout(expert=2, data=2, other=(("recompute", "full"),), everyday=("2",)),
    Layout(expert=2, data=2, other=(("recompute", "selective"),)),
    Layout(expert=2, data=2, other=(("overlap_grad_reduce", False),)),
    Layout(expert=2, data=2, other=(("overlap_param_gather", False),)),
    Layout(expert=4, data=4, everyday=("1.5",)),
    Layout(expert=2, data=4),
    Layout(tensor=2, everyday=("2",)),
    Layout(expert=2, tensor=2, everyday=("2",)),
    Layout(expert=2, tensor=2, other=(("vision", "data"),)),
    Layout(expert=4, tensor=4),
    Layout(tensor=2, data=2),
    Layout(expert=2, tensor=2, data=2),
    Layout(expert=4, tensor=2, data=2, everyday=("2",)),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual=2),
    Layout(expert=2, pipeline=2, data=2, everyday=("0", "2")),
    Layout(expert=2, pipeline=2, virtual=2, data=2),
    Layout(expert=2, pipeline=2, tensor=2),
    Layout(expert=4, pipeline=2, tensor=2, data=2),
    Layout(expert=2, pipeline=2, tensor=2, data=2),
    Layout(context=2),
    Layout(expert=2, context=2, everyday=("2",)),
    Layout(expert=4, context=2, data=2),
    Layout(expert=4, context=2, tensor=2),
    Layout(expert=2, context=2, tensor=2, pipeline=2),
    Layout(expert=2, context=2, pipeline=2, data=2),
)
CASES = [
    (layout, mask)
    for layout in LAYOUTS
    for mask in MASKS
    if mask in layout.everyday or asks_for_all()
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_dataset(folder, packs=12, capacity=128, alignment=8, **sizes_of(MODEL))
    return folder


def _config(dataset: Path, architecture: Architecture = MODEL, **settings: Any) -> Config:
    experts = dataclasses.replace(
        LOSSES, **{name: settings.pop(name) for name in list(settings) if name in vars(LOSSES)}
    )
    config = config_for(dataset, adam_eps=1e-3, **settings)
    return dataclasses.replace(config, architecture=architecture, experts=experts)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Callable[[str], Curve]:
    """Return a cached function that trains in one process, for a freeze mask."""
    return cache(
        lambda mask: ranks.run(train_curve, 1, _config(dataset, trainable=MASKS[mask], steps=5))[0]
    )


@pytest.mark.parametrize(("layout", "mask"), CASES, ids=str)
def test_a_layout_trains_like_one_process(
    ranks: Pool, dataset: Path, alone: Callable[[str], Curve], layout: Layout, mask: str
) -> None:
    config = _config(dataset, trainable=MASKS[mask], steps=5, **layout.settings)
    curves = ranks.run(train_curve, layout.ranks, config)
    found = compare(curves, alone(mask))
    assert max(found.values()) <= LIMIT, found
