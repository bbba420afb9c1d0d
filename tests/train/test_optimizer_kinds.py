"""Adam, SGD and Muon's iteration against torch's and NVIDIA's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from megavlm.config.checks.optimizer import optimizer_problems
from megavlm.config.parameter_groups import is_orthogonalised, name_problems
from megavlm.config.schema import Optimizer, Training
from megavlm.parallel.adamw import Adam
from megavlm.train.muon import orthogonalised
from megavlm.train.plain_moments import momentum_of, sgd_step


def updated(make: Callable, step: Callable) -> list[torch.Tensor]:
    """Return two parameters after five updates."""
    generator = torch.Generator().manual_seed(2)
    shards = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (7, 40)]
    optimizer = make([dict(params=shards[:1]), dict(params=shards[1:], lr=3e-2, weight_decay=0.0)])
    for _ in range(5):
        for shard in shards:
            shard.grad = torch.randn(shard.shape, generator=generator)
        step(optimizer)
    return [shard.detach() for shard in shards]


@pytest.mark.parametrize("is_decoupled", [True, False])
def test_adam_is_that_of_torch(is_decoupled: bool) -> None:
    settings = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    theirs = torch.optim.AdamW if is_decoupled else torch.optim.Adam
    wanted = updated(lambda groups: theirs(groups, **settings), lambda one: one.step())
    found = updated(
        lambda groups: Adam(groups, adam_w_mode=is_decoupled, **settings), lambda one: one.step()
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("is_nesterov", [True, False])
def test_sgd_is_that_of_torch(is_nesterov: bool) -> None:
    settings = dict(lr=1e-2, weight_decay=0.3)
    wanted = updated(
        lambda groups: torch.optim.SGD(groups, momentum=0.8, nesterov=is_nesterov, **settings),
        lambda one: one.step(),
    )
    kind = Optimizer(kind="sgd", sgd_momentum=0.8, sgd_nesterov=is_nesterov)
    found = updated(lambda groups: Adam(groups, **settings), lambda one: sgd_step(one, kind))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_a_second_moment_that_was_loaded_is_let_go_of() -> None:
    shard = torch.nn.Parameter(torch.ones(1000))
    optimizer = Adam([shard])
    optimizer.state[shard].update(exp_avg=torch.ones(1000), exp_avg_sq=torch.zeros(1000))
    assert momentum_of(optimizer, shard).sum() == 1000
    second = optimizer.state[shard]["exp_avg_sq"]
    assert second.shape == (1000,) and second.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_singular_values_of_an_update_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = orthogonalised(1e3 * matrix, torch.float64).double()
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.mT @ update @ right.mT
    diagonal = values.diagonal()
    assert (values - diagonal.diag()).abs().max() < 1e-5
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    # Rows in another order, as tensor-parallel ranks hold them, are the update's too; padding is 0.
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(matrix[order], (0, 3, 0, 5))
    moved = orthogonalised(padded, torch.float64).double()
    torch.testing.assert_close(moved[: shape[0], : shape[1]], update[order], rtol=0, atol=1e-5)
    assert not moved[shape[0] :].any() and not moved[:, shape[1] :].any()
    assert not orthogonalised(torch.zeros(3, 4)).any()


def test_muon_s_update_is_that_of_the_package_that_megatron_core_uses() -> None:
    theirs = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers")
    generator = torch.Generator().manual_seed(4)
    matrix = torch.nn.Parameter(torch.randn(24, 40, generator=generator))
    settings = dict(lr=1e-2, weight_decay=0.1, momentum=0.9, extra_scale_factor=0.2)
    muon = theirs.Muon([matrix], nesterov=True, fp32_matmul_prec="highest", **settings)
    ours = copy.deepcopy(matrix.detach())
    momentum = torch.zeros_like(ours)
    for _ in range(3):
        matrix.grad = torch.randn(24, 40, generator=generator)
        muon.step()
        momentum.lerp_(matrix.grad, 0.1)
        update = orthogonalised(matrix.grad.lerp(momentum, 0.9)) * 0.2 * 40**0.5
        ours = ours * (1 - 1e-3) - 1e-2 * update
    torch.testing.assert_close(ours, matrix.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(kind="sgd", adam_beta2=0.9), "--optimizer.adam_beta2 0.9 has no effect with"),
        (dict(muon_scale=0.1), "--optimizer.muon_scale 0.1 has no effect with --optimizer.kind ad"),
        (dict(kind="adam", sgd_nesterov=True), "--optimizer.sgd_nesterov True has no effect"),
        (dict(kind="sgd", sgd_momentum=1.0), "--optimizer.sgd_momentum 1.0: must be 0 or more"),
        (dict(kind="sgd", sgd_momentum=0.0, sgd_nesterov=True), "--optimizer.sgd_nesterov true n"),
        (dict(kind="muon", muon_scale=0.0), "--optimizer.muon_scale 0.0: must be above 0"),
        (dict(schedule="WSD", warmup_steps=2000), "--optimizer.warmup_steps 2000 is more than"),
        (dict(kind="muon", moments="bfloat16"), "--optimizer.moments bfloat16: the moments of"),
    ],
)
def test_settings_of_another_kind_are_refused(settings: dict, told: str) -> None:
    problems = list(optimizer_problems(Optimizer(**settings), Training(precision="bfloat16")))
    assert len(problems) == 1 and problems[0].startswith(told), problems


def test_muon_takes_matrices_of_layers_and_is_refused_without_any() -> None:
    taken = {
        "vision.encoder.layers.0.self_attention.linear_qkv.weight": True,
        "language.decoder.layers.11.mlp.experts.3.linear_fc2.weight": True,
        "language.decoder.layers.1.cross.linear_k.weight": True,
        "connector.mlp.linear_fc1.weight": True,
        "language.decoder.layers.1.mlp.linear_fc1.layer_norm_weight": False,
        "language.decoder.layers.1.mlp.linear_fc1.lora.a": False,
        "language.decoder.layers.1.mlp.router.weight": False,
        "language.embedding.word_embeddings.weight": False,
        "language.output_layer.weight": False,
        "vision.patch_embedding.weight": False,
        "connector.queries": False,
    }
    assert {key: is_orthogonalised(key, "muon") for key in taken} == taken
    assert not any(is_orthogonalised(key, "adamw") for key in taken)
    muon = Optimizer(kind="muon")
    [problem] = name_problems(muon, ("language.output_layer",), taken)
    assert problem.startswith("--optimizer.kind muon: nothing that --training.trainable trains")
    assert not list(name_problems(muon, ("language",), taken))
