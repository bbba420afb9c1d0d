"""A connector of one's own: all that it takes stands in this file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from megatron.core.transformer import MegatronModule
from torch import Tensor, nn

from megavlm.config.checks.rules import problems
from megavlm.config.connectors import PART, Connector, Ends
from megavlm.config.pieces import Piece, linear
from megavlm.config.schema import Config
from megavlm.model.connector import register
from megavlm.model.transformer import connector_config
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, config_for, train_curve, whole_weights
from tests.ranks.test_resume import LAST, STEPS, forget_the_end, losses, make_job, run_job
from tests.ranks.test_resume import dataset as dataset

ARCHITECTURE = dataclasses.replace(TINY, connector=Connector(kind="average"))
LAYOUT = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, layout="v*2|v,c,t*3,h")


@dataclass(frozen=True)
class AverageSizes:
    """Means of four neighbouring patches, and one linear layer, whole on every rank."""

    settings: Connector
    ends: Ends

    @property
    def features(self) -> int:
        return (self.ends.grid // 2) ** 2

    placeholders = features

    @property
    def feature_size(self) -> int:
        return self.ends.input_size

    @property
    def all_reduced_elements(self) -> int:
        return 0

    def problems(self) -> Iterator[str]:
        if self.ends.grid % 2:
            yield f"the connector average needs an even grid; it is {self.ends.grid}"

    def pieces(self) -> Iterator[Piece]:
        sizes = dict(rows=self.features, unit="tile", has_bias=True)
        yield from linear(
            "connector.linear", PART, self.ends.input_size, self.ends.output_size, **sizes
        )

    def kept(self, tensor_size: int) -> float:
        return self.features * self.ends.input_size


class AverageConnector(MegatronModule):
    """The module of ``AverageSizes``."""

    def __init__(self, config: Config, kernels, groups):
        super().__init__(connector_config(config, kernels))
        vision = config.architecture.vision
        self.side = vision.grid
        self.class_tokens = int(vision.has_class_token)
        self.linear = nn.Linear(
            vision.hidden_size,
            config.architecture.language.hidden_size,
            dtype=self.config.params_dtype,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        patches = hidden[self.class_tokens :].permute(1, 2, 0).unflatten(-1, (self.side, self.side))
        pooled = nn.functional.avg_pool2d(patches, 2).flatten(2).transpose(1, 2)
        return self.linear(pooled.flatten(0, 1))[:, None]


register("average", AverageSizes, AverageConnector)


# Ranks import this file, and so know the connector, because what they run stands in it.
def train(config: Config) -> Curve:
    return train_curve(config)


def run(config: Config) -> int:
    return run_job(config)


def averaged(config: Config) -> Config:
    return dataclasses.replace(config, architecture=ARCHITECTURE)


@pytest.mark.parametrize("mask", [("connector",), ("vision", "connector", "language")])
def test_it_trains_like_one_process(ranks: Pool, dataset: Path, mask: tuple[str, ...]) -> None:
    settings = dict(trainable=mask, steps=3)
    [one] = ranks.run(train, 1, averaged(config_for(dataset, **settings)))
    four = ranks.run(train, 4, averaged(config_for(dataset, **settings, **LAYOUT)))
    assert four[0].losses == pytest.approx(one.losses, rel=1e-5)
    assert four[0].grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    before = whole_weights([one])
    after = whole_weights(four)
    assert before.keys() == after.keys() >= {"connector.linear.weight", "connector.linear.bias"}
    for key, weight in before.items():
        assert after[key] == pytest.approx(weight, rel=1e-4, abs=1e-5), key
    assert min(one.grad_norms) > 0


def test_the_planner_knows_its_weights_and_flops(dataset: Path) -> None:
    from megavlm.planner.estimate import Hardware, Packs, estimate
    from megavlm.planner.flops import training_cost
    from megavlm.planner.layout import make_layout
    from megavlm.planner.parameters import parameters_on_rank
    from megavlm.planner.partition import PackSize

    config = averaged(config_for(dataset, trainable=("connector",), **LAYOUT))
    held = [parameters_on_rank(config, chunk) for chunk in make_layout(config).chunks]
    assert [one.trained for one in held] == [0, 32 * 48 + 48]
    cost = training_cost(ARCHITECTURE, ()).by_part(tokens=0, squared_lengths=0, tiles=1)
    assert cost["connector"] == 2 * 32 * 48 * 4
    size = PackSize(tokens=100.0, squared_lengths=1000.0, tiles=4.0)
    assert estimate(config, 4, Packs(size=size, capacity=128), Hardware()).step_ms > 0


def test_it_is_saved_and_resumed_at_another_layout(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    ranks.run(run, 4, averaged(make_job(dataset, tmp_path / "whole", **LAYOUT)))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(run, 1, averaged(make_job(dataset, tmp_path / "killed")))
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
    state = json.loads((tmp_path / "killed" / LAST / "state.json").read_text())
    assert state["step"] == STEPS


def test_an_export_is_refused_with_a_sentence(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    from megavlm.convert.hf import convert

    config = averaged(make_job(dataset, tmp_path / "run", export_hf=str(tmp_path / "hf")))
    [refused] = problems(config, 1)
    assert "export_hf" in refused and "connector.kind mlp" in refused and "average" in refused
    ranks.run(run, 1, averaged(make_job(dataset, tmp_path / "run")))
    with pytest.raises(ValueError, match="this model has average; it stays in checkpoints"):
        convert.export(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_settings_that_cannot_be_are_refused(dataset: Path) -> None:
    vision = dataclasses.replace(TINY.vision, image_size=20)
    config = averaged(config_for(dataset))
    config = dataclasses.replace(
        config, architecture=dataclasses.replace(ARCHITECTURE, vision=vision)
    )
    assert any("needs an even grid; it is 5" in problem for problem in problems(config, 1))
    with pytest.raises(ValueError, match="exists already"):
        register("average", AverageSizes, AverageConnector)
