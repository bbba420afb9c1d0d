"""LoRA adapters at every layout, across checkpoints, and in what is exported."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megavlm.config.lora import MAGNITUDE, Lora, is_adapter
from megavlm.config.schema import Config
from megavlm.data.loading.batch import BatchOptions
from tests.convert.models import PERSIMMON
from tests.ranks.pool import Pool
from tests.ranks.runs import (
    TINY,
    Curve,
    assert_same_part_norms,
    config_for,
    make_packs,
    train_curve,
    whole_weights,
)
from tests.ranks.test_resume import (
    LAST,
    forget_the_end,
    losses,
    make_job,
    resume_bit_for_bit,
    run_job,
    saved_tensors,
)

MATRIX = os.environ.get("MEGAVLM_MATRIX") == "all"
ADAPTERS = Lora(rank=4, targets=("vision", "language"))
DORA = dataclasses.replace(ADAPTERS, dora=True)
MASK = ("connector", "vision.*.lora", "language.*.lora")
# Rates by part, name and layer, as in tests/ranks/test_parameter_groups.py.
GROUPS = dict(
    lr_multipliers=("vision=0.5", "connector=4", "*.lora.b=2"),
    vision_layer_decay=0.8,
    language_layer_decay=0.9,
)
SETTINGS = GROUPS | dict(trainable=MASK, steps=3, lr=1e-2, warmup_ratio=0.0, adam_eps=1e-4)
SETTINGS |= dict(global_batch_size=2)
TENSOR = dict(tensor_model_parallel_size=2)
PIPELINE = dict(pipeline_model_parallel_size=2, layout="v*2|v,t*3")


def with_adapters(config: Config, lora: Lora = ADAPTERS) -> Config:
    architecture = dataclasses.replace(config.architecture, lora=lora)
    return dataclasses.replace(config, architecture=architecture)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "train"
    make_packs(folder, packs=10, image_share=0.8, alignment=4)
    return folder


@pytest.fixture(scope="module")
def alone(ranks: Pool, dataset: Path) -> Curve:
    """Train in one process."""
    return ranks.run(train_curve, 1, with_adapters(config_for(dataset, **SETTINGS)))[0]


LAYOUTS = [
    (2, TENSOR | dict(sequence_parallel=True)),
    (2, TENSOR | dict(vision="data")),
    (2, dict(context_parallel_size=2)),
    (4, PIPELINE),
    (4, TENSOR | PIPELINE | dict(sequence_parallel=True, recompute="full")),
]
RARE = [
    (2, TENSOR),
    (2, PIPELINE),
    (8, TENSOR | PIPELINE | dict(sequence_parallel=True, recompute="full")),
    (2, dict(recompute="selective")),
    (4, dict(tensor_model_parallel_size=4)),
    (4, TENSOR | PIPELINE | dict(vision="data", recompute="full")),
    (4, TENSOR | dict(context_parallel_size=2, sequence_parallel=True)),
]
OF_DORA = [LAYOUTS[-1], (2, TENSOR | dict(vision="data"))]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS + (RARE if MATRIX else []))
def test_training_is_that_of_one_process(
    ranks: Pool, dataset: Path, alone: Curve, world: int, layout: dict
) -> None:
    config = with_adapters(config_for(dataset, **SETTINGS, **layout))
    shared = ranks.run(train_curve, world, config)
    assert_equal_training(shared, alone)


def assert_equal_training(shared: list[Curve], alone: Curve) -> None:
    """Compare a layout with one process."""
    assert shared[0].losses == pytest.approx(alone.losses, rel=1e-5)
    assert shared[0].grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
    assert set(alone.part_norms["grad_norm"]) == {"adapters", "connector"}
    assert_same_part_norms(shared, alone)
    found = whole_weights(shared)
    for key, weight in whole_weights([alone]).items():
        place = tuple(slice(0, size) for size in weight.shape)
        np.testing.assert_allclose(found[key][place], weight, 1e-4, 1e-5, err_msg=key)


def test_training_with_dora_is_that_of_one_process_and_starts_at_the_base(
    ranks: Pool, dataset: Path, alone: Curve
) -> None:
    [dora] = ranks.run(train_curve, 1, with_adapters(config_for(dataset, **SETTINGS), DORA))
    assert dora.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)
    assert dora.losses[2] != pytest.approx(alone.losses[2], rel=1e-4)
    weights = whole_weights([dora])
    norms = [key for key in weights if key.endswith(MAGNITUDE)]
    assert len(norms) == 4 * (3 + 3)
    first = "language.decoder.layers.0.self_attention.linear_proj"
    start = np.linalg.norm(weights[f"{first}.weight"], axis=1)
    assert 1e-3 < np.abs(weights[first + MAGNITUDE] - start).max() < 0.1
    layouts = OF_DORA + ([*LAYOUTS[:-1], *RARE] if MATRIX else [])
    for world, layout in layouts:
        config = with_adapters(config_for(dataset, **SETTINGS, **layout), DORA)
        assert_equal_training(ranks.run(train_curve, world, config), dora)


def test_the_base_stays_as_it_is_and_every_adapter_learns(
    ranks: Pool, dataset: Path, alone: Curve
) -> None:
    still = with_adapters(config_for(dataset, **SETTINGS | dict(steps=1, lr=1e-30)))
    before = whole_weights(ranks.run(train_curve, 1, still))
    after = whole_weights([alone])
    assert len([key for key in after if is_adapter(key)]) == 2 * 4 * (3 + 3)
    for key, weight in after.items():
        is_trained = is_adapter(key) or key.startswith("connector.")
        assert np.array_equal(weight, before[key]) != is_trained, key
    # Nothing but the adapters' own product changes the first loss, and B starts at zero.
    plain = config_for(dataset, **SETTINGS | dict(trainable=("connector",)))
    [base] = ranks.run(train_curve, 1, plain)
    assert base.losses[0] == alone.losses[0] and base.losses[2] != alone.losses[2]


def logits_with_and_without(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare adapters with the weights that they are merged into by definition."""
    from megavlm.model.weights import named_weights
    from tests.ranks.runs import build

    job = build(config)
    weights = named_weights(job.chunks[0])
    generator = torch.Generator().manual_seed(1)
    for key, weight in weights.items():
        if key.endswith(".lora.b"):
            weight.data.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        elif key.endswith(MAGNITUDE):
            weight.data.mul_(0.5 + torch.rand(weight.shape, generator=generator))
        elif key.endswith(".bias"):
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    batch = job.train.batch(0, 0, BatchOptions(vision_layers=3))
    with torch.no_grad():
        found = job.chunks[0](batch, with_loss=False)
    return found, {key: weight.detach().clone() for key, weight in weights.items()}


# Phi-3's files hold queries, keys and values in one weight, gate and up in another, and Persimmon's
# MLP has no gate.
FAMILIES = {
    "qwen2": {},
    "phi3": dict(family="phi3", qkv_bias=False),
    "persimmon": PERSIMMON | dict(num_query_groups=TINY.language.num_attention_heads),
}


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, ADAPTERS) for family in FAMILIES), ("qwen2", DORA)]
)
def test_each_weight_of_files_has_an_adapter_of_its_own(
    ranks: Pool, dataset: Path, family: str, lora: Lora
) -> None:
    from megavlm.convert.weights.adapters import MergedAdapters

    def configured(**settings: object) -> Config:
        config = config_for(dataset, **SETTINGS | settings)
        language = dataclasses.replace(config.architecture.language, **FAMILIES[family])
        architecture = dataclasses.replace(config.architecture, language=language)
        return dataclasses.replace(config, architecture=architecture)

    config = with_adapters(configured(), lora)
    [(wanted, weights)] = ranks.run(logits_with_and_without, 1, config)
    merged = MergedAdapters(Held(weights), config.architecture)
    plain = configured(trainable=("connector",))
    [found] = ranks.run(logits_of, 1, (plain, {key: merged[key] for key in merged.headers}))
    assert (found - wanted).abs().max() < 1e-5 < wanted.abs().max()


class Held:
    """Tensors in memory, as ``Tensors`` of the conversion."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        from megavlm.convert.weights.views import Header

        self._tensors = tensors
        self.headers = {
            key: Header(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()
        }

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def ranges(self, key: str, rows: range) -> None:
        return None


def logits_of(asked: tuple[Config, dict[str, torch.Tensor]]) -> torch.Tensor:
    from megavlm.model.weights import named_weights
    from tests.ranks.runs import build

    config, weights = asked
    job = build(config)
    with torch.no_grad():
        for key, weight in named_weights(job.chunks[0]).items():
            place = tuple(slice(0, size) for size in weights[key].shape)
            weight[place].copy_(weights[key])
        return job.chunks[0](job.train.batch(0, 0, BatchOptions(vision_layers=3)), with_loss=False)


@pytest.mark.parametrize("lora", [ADAPTERS, DORA] if MATRIX else [DORA])
def test_a_run_starts_from_a_model_without_adapters_and_resumes_bit_for_bit(
    ranks: Pool, dataset: Path, tmp_path: Path, lora: Lora
) -> None:
    ranks.run(run_job, 1, make_job(dataset, tmp_path / "base", stage="1", trainable=("connector",)))
    settings = dict(trainable=MASK, drop_path=0.1, **GROUPS)

    def job(save: Path) -> Config:
        load = tmp_path / "base" if save.name == "whole" else ""
        return with_adapters(make_job(dataset, save, load, **settings, **TENSOR, **PIPELINE), lora)

    whole = resume_bit_for_bit(ranks, 4, job, tmp_path)
    [base] = ranks.run(saved_tensors, 1, tmp_path / "base" / LAST)
    frozen = [key for key in base if key.startswith("model.") and "connector" not in key]
    assert frozen and all(torch.equal(base[key], whole[key]) for key in frozen)
    moments = [key for key in whole if key.startswith("optimizer.state.exp_avg.")]
    assert all("connector" in key or ".lora." in key for key in moments)
    # At one process too.
    forget_the_end(tmp_path / "whole", tmp_path / "one")
    ranks.run(run_job, 1, with_adapters(make_job(dataset, tmp_path / "one", **settings), lora))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole")[3:], rel=1e-5)


def test_other_adapters_are_refused_on_resume(ranks: Pool, dataset: Path, tmp_path: Path) -> None:
    from megavlm.train.inspection import inspect

    job = make_job(dataset, tmp_path / "run", trainable=MASK, drop_path=0.1)
    ranks.run(run_job, 1, with_adapters(job))
    for other in (Lora(), Lora(rank=8, targets=("vision", "language"))):
        with pytest.raises(ValueError, match=r"architecture\.lora\.rank: 4 in the checkpoint"):
            inspect(with_adapters(job, other), 1)


def test_heads_that_do_not_divide_get_adapters_too(ranks: Pool, dataset: Path) -> None:
    vision = dataclasses.replace(TINY.vision, hidden_size=36, num_attention_heads=3)
    curves = []
    for layout in (dict(), TENSOR):
        config = with_adapters(config_for(dataset, **SETTINGS, **layout))
        architecture = dataclasses.replace(config.architecture, vision=vision)
        config = dataclasses.replace(config, architecture=architecture)
        curves.append(ranks.run(train_curve, config.parallel.model_parallel_size, config)[0])
    assert curves[0].losses == pytest.approx(curves[1].losses, rel=1e-5)
    assert curves[0].grad_norms == pytest.approx(curves[1].grad_norms, rel=1e-5)
