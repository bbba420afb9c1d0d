"""Dropout on the input of adapters: the same at every layout and after a resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megavlm.config.lora import Lora, dropout_problems
from megavlm.config.schema import Config, Parallel
from megavlm.data.loading.batch import BatchOptions
from megavlm.model.lora_dropout import Location, adapter_salt, drop
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs, train_curve
from tests.ranks.test_lora import PIPELINE, SETTINGS, TENSOR, with_adapters
from tests.ranks.test_resume import forget_the_end, losses, make_job, run_job

DROPPING = Lora(rank=4, targets=("vision", "language"), dropout=0.3)
MASK = SETTINGS["trainable"]
LAYOUTS = [
    (2, TENSOR | dict(sequence_parallel=True)),
    (4, TENSOR | PIPELINE | dict(vision="data")),
    # Layers are computed again after other microbatches. Of the vision encoder's, which stand far
    # from the loss, neither it nor the gradient's norm would tell.
    (2, PIPELINE | dict(layout="v*3,t*2|t", recompute="full")),
    (2, PIPELINE | dict(layout="v*3,t*2|t", recompute="selective")),
    (2, TENSOR),
    (2, PIPELINE),
    (1, dict(recompute="full")),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8)
    return folder


def test_every_layout_drops_the_same_numbers(ranks: Pool, dataset: Path) -> None:
    def curve(world: int, lora: Lora = DROPPING, **layout):
        settings = SETTINGS | dict(steps=3)
        return ranks.run(
            train_curve, world, with_adapters(config_for(dataset, **settings, **layout), lora)
        )[0]

    alone = curve(1)
    plain = curve(1, dataclasses.replace(DROPPING, dropout=0.0))
    # B is zero in the first step, and dropout matters from the second on.
    assert alone.losses[0] == plain.losses[0] and alone.losses[1] != plain.losses[1]
    assert alone.grad_norms[0] != plain.grad_norms[0]
    for world, layout in LAYOUTS if asks_for_all() else LAYOUTS[:4]:
        shared = curve(world, **layout)
        assert shared.losses == pytest.approx(alone.losses, rel=1e-5), layout
        assert shared.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5), layout


def losses_of_positions(config: Config) -> list[float]:
    """Return the loss of one pack at three positions in the order of the data, the last of which is
    the first again, and then in evaluation.
    """
    from megavlm.model.lora import LowRankAdapter
    from tests.ranks.runs import build

    job = build(config)
    for module in job.chunks[0].modules():
        if isinstance(module, LowRankAdapter):
            torch.nn.init.constant_(module.b, 0.1)
    batches = [
        job.train.batch(0, position, BatchOptions(vision_layers=3)) for position in (0, 1, 0)
    ]
    losses = [float(job.chunks[0](batch).sum()) for batch in batches]
    job.chunks[0].eval()
    return [*losses, float(job.chunks[0](batches[0]).sum())]


def test_each_pack_has_draws_of_its_own_and_evaluation_has_none(ranks: Pool, dataset: Path) -> None:
    config = config_for(dataset, trainable=MASK)
    plain = dataclasses.replace(DROPPING, dropout=0.0)
    [dropped, whole] = (
        ranks.run(losses_of_positions, 1, with_adapters(config, lora))[0]
        for lora in (DROPPING, plain)
    )
    assert dropped[0] == dropped[2] != dropped[1]
    assert len({dropped[3], *whole}) == 1 and whole[0] not in dropped[:3]


def test_a_resumed_run_drops_the_same_numbers(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    def job(name: str):
        return with_adapters(make_job(dataset, tmp_path / name, trainable=MASK), DROPPING)

    ranks.run(run_job, 2, job("whole"))
    forget_the_end(tmp_path / "whole", tmp_path / "killed")
    ranks.run(run_job, 2, job("killed"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[3:]


def test_the_share_that_is_dropped_is_the_rate_and_parts_fit_together() -> None:
    ones = torch.ones(64, 3, 500)
    location = Location(draw=123456789)
    salt = adapter_salt("language.decoder.layers.0.mlp.linear_fc1.weight")
    given = ones.clone().requires_grad_()
    dropped = drop(given, 0.3, salt, location)
    dropped.sum().backward()
    assert torch.equal(given.grad, dropped)
    dropped = dropped.detach()
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    for axis in range(3):  # no token, tile or feature is dropped more often than others
        others = [other for other in range(3) if other != axis]
        shares = (dropped == 0).float().mean(dim=others)
        assert float((shares - 0.3).abs().max()) < 0.1
    part = drop(
        ones[:16, :1, :100],
        0.3,
        salt,
        dataclasses.replace(location, first_row=16, first_tile=2, first_feature=400),
    )
    assert torch.equal(part, dropped[16:32, 2:, 400:])
    for other in (
        drop(ones, 0.3, salt + 1, location),
        drop(ones, 0.3, salt, Location(draw=123456790)),
    ):
        assert 0.55 < float(((other == 0) == (dropped == 0)).float().mean()) < 0.61


@pytest.mark.parametrize(
    ("dropout", "parallel", "told"),
    [
        (1.0, dict(), "--architecture.lora.dropout 1.0: must be 0 or more, and less than 1"),
        (0.1, dict(context_parallel_size=2), "with --parallel.context_parallel_size 2 an adapter"),
    ],
)
def test_layouts_that_would_drop_others_are_refused(
    dropout: float, parallel: dict, told: str
) -> None:
    [problem] = dropout_problems(Lora(rank=4, dropout=dropout), Parallel(**parallel))
    assert told in problem
    assert not list(dropout_problems(Lora(rank=4), Parallel(**parallel)))


def saved_bytes(config: Config) -> tuple[int, tuple[int, int]]:
    """Return the bytes that the forward pass of a pack keeps beside parameters, and its tokens and
    tiles.
    """
    from tests.ranks.runs import build

    job = build(config)
    batch = job.train.batch(0, 0, BatchOptions(vision_layers=3))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.chunks[0](batch)
    del loss
    for parameter in job.chunks[0].parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values()), (len(batch.tokens), batch.num_tiles)


@pytest.mark.parametrize("fields", [("dropout", 0.0, 0.3), ("rank", 4, 12)])
def test_the_planner_counts_what_adapters_keep(
    ranks: Pool, dataset: Path, fields: tuple[str, float, float]
) -> None:
    from megavlm.planner.activations import activation_memory
    from megavlm.planner.layout import make_layout
    from megavlm.planner.rank_load import RankLoad

    # Attention over packs keeps no output on a CPU, as it does on a GPU; that over tiles does.
    targets = ("vision.*.self_attention", "language.*.linear_qkv", "language.*.mlp")
    measured = []
    planned = []
    (name, *values) = fields
    for value in values:
        lora = dataclasses.replace(Lora(rank=4, targets=targets), **{name: value})
        config = with_adapters(config_for(dataset, trainable=MASK), lora)
        [(found, (tokens, tiles))] = ranks.run(saved_bytes, 1, config)
        measured.append(found)
        [chunk] = make_layout(config).chunks
        load = RankLoad(tokens=tokens, tiles=tiles)
        planned.append(activation_memory(config, chunk, load).per_microbatch)
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.03)
