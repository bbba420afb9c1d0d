"""An objective of one's own, without a language model: all that it takes stands in this file.

It guesses from a tile how long its text is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from megavlm.config.checks.rules import problems
from megavlm.config.objectives import ObjectiveNeeds
from megavlm.config.pieces import Piece, linear
from megavlm.config.schema import NO_LANGUAGE, Checkpoint, Config, Data, Logging
from megavlm.model.objective import register
from megavlm.model.objective.losses import Losses
from megavlm.model.objective.objective import Objective, of_tokens
from tests.ranks.pool import Pool
from tests.ranks.runs import TINY, Curve, config_for, train_curve, whole_weights
from tests.ranks.test_contrastive import assert_same, pack_pairs
from tests.ranks.test_resume import LAST, STEPS, forget_the_end, losses, run_job

SIZE = 24
WEIGHTS = {"squared": 1.0, "absolute": 0.5}
ARCHITECTURE = dataclasses.replace(TINY, objective="length", language=NO_LANGUAGE)
EVERYTHING = ("vision", "connector", "objective")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2, "layout": "v*2|v,c,h"}),
    "TP2 with copies": (2, {"tensor_model_parallel_size": 2, "vision": "data"}),
}


def head(arch: Any) -> Iterator[Piece]:
    yield from linear("objective.guess", "head", SIZE, 1, rows=1, unit="tile", has_bias=True)


class Length(Objective):
    """The mean of a tile's features tells the length of its text: two losses, and how often the
    guess is good.
    """

    def __init__(self, settings, chunk):
        super().__init__(settings)
        self.guess = nn.Linear(SIZE, 1, dtype=settings.params_dtype) if chunk.has_head else None

    def forward(self, output: Tensor, riding: None, batch) -> Tensor:
        features = self.connector(output)[:, 0].unflatten(0, (output.shape[1], -1)).mean(dim=1)
        lengths = batch.sample_ends[1:].diff(prepend=batch.sample_ends[:1])[: batch.samples]
        guessed = self.guess(features[: batch.samples])[:, 0]
        return guessed.float() - lengths / 16

    def losses(self, output: Tensor, batch) -> Losses:
        errors = {"squared": output**2, "absolute": output.abs()}
        named = {name: of_tokens(error, batch) for name, error in errors.items()}
        hits = (output.abs() < 0.5).sum()
        return Losses.weighted(named, WEIGHTS, {"hits": (hits, hits.new_tensor(len(output)))})


register(
    "length",
    ObjectiveNeeds(
        description="length of a tile's text",
        has_language=False,
        has_vocabulary_head=False,
        is_of_pairs=True,
        head=head,
        head_input=lambda arch: SIZE,
        kept=lambda arch: SIZE,
        connector_output=lambda arch: SIZE,
        losses=lambda arch: WEIGHTS,
        readings=("hits",),
    ),
    lambda settings, config, chunk, kernels, groups: Length(settings, chunk),
)


# Ranks import this file, and so know the objective, because what they run stands in it.
def train(config: Config) -> Curve:
    return train_curve(config)


def run(config: Config) -> int:
    return run_job(config)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "packs"
    pack_pairs(folder, text_tokens=(4, 16), capacity=40)
    return folder


def guessing(packs: Path, **settings: Any) -> Config:
    usual = dict(trainable=EVERYTHING, steps=3, drop_path=0.2, adam_eps=1e-4, lr=1e-3)
    config = config_for(packs, **usual | settings)
    data = Data(train=str(packs), workers=0, loss_reduction="sample")
    return dataclasses.replace(config, architecture=ARCHITECTURE, data=data)


def test_every_layout_trains_like_one_process(ranks: Pool, pairs: Path) -> None:
    one = ranks.run(train, 1, guessing(pairs))
    assert min(one[0].grad_norms) > 0
    assert not any(key.startswith("language") for key in whole_weights(one))
    for world, layout in LAYOUTS.values():
        assert_same(one, ranks.run(train, world, guessing(pairs, **layout)))


def test_a_mask_freezes_the_vision_encoder(ranks: Pool, pairs: Path) -> None:
    mask = ("connector", "objective")
    settings = dict(trainable=mask, drop_path=0.0)
    [one] = ranks.run(train, 1, guessing(pairs, steps=1, **settings))
    many = ranks.run(train, 2, guessing(pairs, **settings, **LAYOUTS["PP2"][1]))
    before = whole_weights([one])
    for key, weight in whole_weights(many).items():
        assert (weight == before[key]).all() == key.startswith("vision."), key


def test_it_is_saved_and_resumed_at_another_layout(
    ranks: Pool, pairs: Path, tmp_path: Path
) -> None:
    def job(save: str, **layout: Any) -> Config:
        checkpoint = Checkpoint(save=str(tmp_path / save), save_interval=3)
        config = guessing(pairs, steps=STEPS, **layout)
        data = dataclasses.replace(config.data, valid=str(pairs))
        logging = Logging(interval=1, tensorboard=True)
        return dataclasses.replace(config, data=data, checkpoint=checkpoint, logging=logging)

    ranks.run(run, 2, job("whole", **LAYOUTS["PP2"][1]))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(run, 1, job("killed"))
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
    state = json.loads((tmp_path / "killed" / LAST / "state.json").read_text())
    assert state["step"] == STEPS
    whole = records_of(tmp_path / "whole")
    assert len(whole) == STEPS and all(0 <= record["hits"] <= 1 for record in whole)
    for record in whole:
        parts = record["squared_loss"] + 0.5 * record["absolute_loss"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    for one, other in zip(whole[3:], records_of(tmp_path / "killed"), strict=True):
        for name in ("squared_loss", "absolute_loss", "hits"):
            assert other[name] == pytest.approx(one[name], rel=1e-5), name
    [*_, valid] = records_of(tmp_path / "whole", "valid_loss")
    parts = valid["valid_squared_loss"] + 0.5 * valid["valid_absolute_loss"]
    assert valid["valid_loss"] == pytest.approx(parts, rel=1e-5) and "valid_hits" in valid


def records_of(folder: Path, name: str = "loss") -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if name in (record := json.loads(line))]


def test_the_planner_knows_its_weights_and_layouts(pairs: Path) -> None:
    from megavlm.planner.estimate import Hardware, Packs, estimate
    from megavlm.planner.flops import training_cost
    from megavlm.planner.layout import make_layout
    from megavlm.planner.parameters import parameters_on_rank
    from megavlm.planner.partition import PackSize

    config = guessing(pairs, trainable=("connector", "objective"), **LAYOUTS["PP2"][1])
    layout = make_layout(config)
    assert str(layout) == "v*2|v,c,h" and layout.embedding_chunk == 1
    held = [parameters_on_rank(config, chunk) for chunk in layout.chunks]
    connector = sum(piece.elements for piece in ARCHITECTURE.connector_sizes.pieces())
    assert [one.trained for one in held] == [0, connector + SIZE + 1]
    cost = training_cost(ARCHITECTURE, ()).by_part(tokens=9, squared_lengths=81, tiles=1)
    assert cost["language"] == 0 and cost["head"] == 2 * SIZE
    size = PackSize(tokens=100.0, squared_lengths=1000.0, tiles=4.0)
    for parallel in (config.parallel, dataclasses.replace(config.parallel, layout="auto")):
        planned = dataclasses.replace(config, parallel=parallel)
        found = estimate(planned, 2, Packs(size=size, capacity=40), Hardware())
        assert found.step_ms > 0 and len(found.chunk_ms) == 2


def test_what_needs_a_language_model_is_refused(pairs: Path) -> None:
    def problems_of(config: Config, **settings: Any) -> list[str]:
        checkpoint = Checkpoint(save_interval=0)
        return problems(dataclasses.replace(config, checkpoint=checkpoint, **settings), 2)

    assert not problems_of(guessing(pairs))
    with_language = dataclasses.replace(ARCHITECTURE, language=TINY.language)
    [one] = problems_of(guessing(pairs), architecture=with_language)
    assert one.startswith("--architecture.language.num_layers 3: --architecture.objective length")
    without = dataclasses.replace(TINY, language=NO_LANGUAGE)
    [one] = problems_of(guessing(pairs), architecture=without)
    assert "--architecture.language.num_layers 0" in one and "needs a language model" in one
    layout = dict(pipeline_model_parallel_size=2, layout="v*3|c,h")
    [one] = problems_of(guessing(pairs, **layout))
    assert one.startswith("--parallel.layout v*3|c,h: each chunk must have a layer")
    found = problems_of(guessing(pairs, tensor_model_parallel_size=2, sequence_parallel=True))
    assert ["sequence_parallel true" in line for line in found] == [True]
    with pytest.raises(ValueError, match="exists already"):
        register("length", ObjectiveNeeds(description="", head=head, connector_output=len), len)
