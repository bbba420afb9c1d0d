"""Adapters on weights of 4 bits (QLoRA): the same values at every layout, and after a resume."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from megavlm.config.lora import Lora, lora_problems
from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from megavlm.model.nf4 import Nf4Weight, rounded
from tests.ranks.layouts import asks_for_all
from tests.ranks.pool import Pool
from tests.ranks.runs import config_for, make_packs, train_curve
from tests.ranks.test_lora import MASK, PIPELINE, SETTINGS, TENSOR, with_adapters
from tests.ranks.test_resume import (
    STEPS,
    forget_the_end,
    losses,
    make_job,
    run_job,
    saved_tensors,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "nf4.json.gz"
QUANTISED = Lora(rank=4, targets=("vision", "language"), nf4=("vision", "language"))
LAYOUTS = [(2, TENSOR | dict(sequence_parallel=True)), (4, TENSOR | PIPELINE)]
RARE = [
    (2, TENSOR),
    (2, TENSOR | dict(vision="data")),
    (2, PIPELINE),
    (2, dict(context_parallel_size=2)),
    (4, dict(tensor_model_parallel_size=4)),
    (8, TENSOR | PIPELINE | dict(sequence_parallel=True, recompute="full")),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8, alignment=4)
    return folder


def test_values_are_those_of_bitsandbytes() -> None:
    with gzip.open(GOLDEN, "rt") as file:
        golden = json.load(file)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.tensor(golden["weight"]).to(dtype)
        expected = torch.tensor(golden[str(dtype)]).to(dtype)
        assert torch.equal(rounded(weight), expected)
        # What was in 4 bits once stays as it is.
        assert torch.equal(rounded(expected), expected)
    assert torch.equal(rounded(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_rows_need_not_be_whole_blocks() -> None:
    weight = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    whole = rounded(weight)
    assert torch.equal(whole[:, 64:], rounded(weight[:, 64:]))
    assert torch.equal(whole[:, :64], rounded(weight[:, :64]))
    tail = Nf4Weight(weight[:, 64:], first=64)
    assert torch.equal(tail.whole(), whole[:, 64:]) and tail.codes.nbytes == 6 * 32


@dataclasses.dataclass(frozen=True)
class Result:
    """What a pack gives: loss and gradients; the weights that are in 4 bits, and the bytes that
    their parameters take.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    nbytes: int


def result_of(config: Config, given: dict[str, torch.Tensor]) -> Result:
    """Run a pack forward and backward, with ``given`` weights."""
    from megavlm.model import nf4_layers
    from megavlm.model.weights import named_weights
    from tests.ranks.runs import build

    job = build(config)
    chunk = job.chunks[0]
    weights = named_weights(chunk)
    in_4_bits = nf4_layers.weights(job.chunks)
    for key, weight in sorted(weights.items()):
        if key in given:
            weight.data.copy_(given[key])
        if key.endswith(".lora.b"):
            generator = torch.Generator().manual_seed(len(key))
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    loss = chunk(job.train.batch(0, 0, BatchOptions(vision_layers=3))).sum()
    loss.backward()
    frozen = [weight for key, weight in weights.items() if QUANTISED.quantises(key)]
    gradients = {
        key: (weight.main_grad if weight.grad is None else weight.grad).clone()
        for key, weight in weights.items()
        if weight.requires_grad
    }
    return Result(
        loss=float(loss),
        gradients=gradients,
        weights={key: in_4_bits[id(w)].whole() for key, w in weights.items() if id(w) in in_4_bits},
        nbytes=sum(weight.untyped_storage().nbytes() for weight in frozen),
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_and_gradients_are_those_of_the_dequantised_weights(
    ranks: Pool, dataset: Path, recompute: str
) -> None:
    config = config_for(dataset, trainable=(*MASK, "*.bias"), recompute=recompute)
    [found] = ranks.run(result_of, 1, with_adapters(config, QUANTISED), {})
    plain = Lora(rank=4, targets=QUANTISED.targets)
    [expected] = ranks.run(result_of, 1, with_adapters(config, plain), found.weights)
    assert len(found.weights) == 4 * 6 and found.loss == expected.loss
    assert found.gradients.keys() == expected.gradients.keys() and len(found.gradients) > 40
    assert all(float(gradient.norm()) > 0 for gradient in found.gradients.values())
    for key, gradient in found.gradients.items():
        assert torch.equal(gradient, expected.gradients[key]), key
    assert found.nbytes == 4 * 4 * 6 < expected.nbytes  # a number a layer stands for the weight


@pytest.mark.parametrize(("world", "layout"), LAYOUTS + (RARE if asks_for_all() else []))
def test_every_layout_has_the_values_of_one_process(
    ranks: Pool, dataset: Path, alone: list[float], world: int, layout: dict
) -> None:
    config = with_adapters(config_for(dataset, **SETTINGS, **layout), QUANTISED)
    assert ranks.run(train_curve, world, config)[0].losses == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> list[float]:
    config = with_adapters(config_for(dataset, **SETTINGS), QUANTISED)
    losses = ranks.run(train_curve, 1, config)[0].losses
    plain = with_adapters(config_for(dataset, **SETTINGS), Lora(rank=4, targets=QUANTISED.targets))
    assert abs(ranks.run(train_curve, 1, plain)[0].losses[0] / losses[0] - 1) > 1e-4
    return losses


def test_a_run_resumes_bit_for_bit_and_leaves_its_base_alone(
    ranks: Pool, dataset: Path, tmp_path: Path
) -> None:
    def job(name: str, **layout: object) -> Config:
        base = tmp_path / "base" if name == "whole" else ""
        settings = dict(trainable=MASK, drop_path=0.1, **layout)
        return with_adapters(make_job(dataset, tmp_path / name, base, **settings), QUANTISED)

    ranks.run(run_job, 1, make_job(dataset, tmp_path / "base", stage="1", trainable=("connector",)))
    everywhere = TENSOR | PIPELINE if asks_for_all() else TENSOR
    world = 4 if asks_for_all() else 2
    ranks.run(run_job, world, job("whole", **everywhere))
    last = f"step_{STEPS:08d}"
    for name, layout in (("killed", everywhere), ("alone", {})):
        forget_the_end(tmp_path / "whole", tmp_path / name)
        ranks.run(run_job, world if layout else 1, job(name, **layout))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)
    base, whole, killed, one = (
        ranks.run(saved_tensors, 1, tmp_path / name / last)[0]
        for name in ("base", "whole", "killed", "alone")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    for key, weight in base.items():
        name = key.removeprefix("model.")
        if key.startswith("model.") and not name.startswith("connector"):
            kept = rounded(weight) if QUANTISED.quantises(name) else weight
            assert torch.equal(whole[key], kept) and torch.equal(one[key], kept), key


def test_what_cannot_be_in_4_bits_is_told() -> None:
    keys = ["language.decoder.layers.0.mlp.linear_fc1.weight", "language.output_layer.weight"]

    def told(*patterns: str, rank: int = 4, trainable: tuple[str, ...] = ()) -> str:
        lora = Lora(rank=rank, targets=("language",), nf4=patterns)
        return "\n".join(lora_problems(lora, trainable, keys))

    assert "nf4 language.output_layer: means no linear layer" in told("language.output_layer")
    assert "is trained, and 4 bits are for frozen weights" in told(
        "language", trainable=("language.decoder",)
    )
    assert "nf4 has no effect without --architecture.lora.rank" in told("language", rank=0)
    assert told("language") == ""
