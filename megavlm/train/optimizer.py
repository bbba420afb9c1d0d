"""Gradient reduction and the optimizer, both of megatron-core, with the optimizer's state shared
out over the data-parallel ranks.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megavlm.config.schema import Config
from megavlm.model.precision import dtype_of
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train import optimizer_state, parameter_groups
from megavlm.train.muon import Muon
from megavlm.train.parameter_groups import age_of, frozen_steps_of, multiplier_of
from megavlm.train.plain_moments import sgd_step
from megavlm.train.schedule import learning_rate, weight_decay
from megavlm.train.sliced_update import step_in_slices

_MOMENTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        # megatron-core saves int16 remainders of main weights as float32, and nothing can load
        # that: this optimizer asserts int16, one with float32 moments takes them for weights.
        "store_param_remainders": False,
    },
}


class _Reduction(DistributedDataParallel):
    """megatron-core's, whose hooks do not keep the model in memory: torch's graph holds them, and a
    circle that leads through it is one that Python's garbage collection does not find.
    """

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        return DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)


def wrap_chunks(
    config: Config, chunks: Sequence[VisionLanguageModel]
) -> list[DistributedDataParallel]:
    """Reduce gradients over data-parallel replicas in float32. The freeze mask must be set before.

    The gradients of all but a rank's first chunk are summed in one go: its other chunks compute
    meanwhile.
    """
    ddp_chunks = [
        _Reduction(
            chunk.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=config.parallel.overlap_grad_reduce,
                overlap_param_gather=config.parallel.overlap_param_gather,
                bucket_size=config.parallel.bucket_size or None,
            ),
            chunk,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in ddp_chunks:
        _wait_in_owners_only(chunk)
    return ddp_chunks


def _wait_in_owners_only(chunk: DistributedDataParallel) -> None:
    """Take the hook that waits for gathered weights from modules that own none that is trained, two
    thirds of all. ``DistributedDataParallel.enable_forward_pre_hook`` gives it to every module, and
    each pack would call it there for nothing.
    """
    for module, handle in chunk.remove_forward_pre_hook_handles.items():
        owned = module.parameters(recurse=False)
        if not any(parameter in chunk.param_to_bucket_group for parameter in owned):
            handle.remove()


@contextlib.contextmanager
def whole_weights(ddp_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Wait until every rank holds all updated weights, so that they can be read or saved inside the
    context. Collective.

    Between the optimizer's update and the next forward pass a rank has its own share of them only,
    where collecting overlaps.
    """
    overlapping = [chunk for chunk in ddp_chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapping:
        chunk.disable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()
            _wait_in_owners_only(chunk)


def build_optimizer(
    config: Config,
    ddp_chunks: Sequence[DistributedDataParallel],
    ages: Mapping[int, int] = MappingProxyType({}),
) -> MegatronOptimizer:
    """Create the optimizer over what is trained. Collective: every rank calls it, with nothing to
    train too.

    Args:
        config: the run.
        ddp_chunks: this rank's chunks.
        ages: updates that the moments of each weight have seen before this run, by ``id`` of the
            parameter; none: all are fresh.
    """
    optimizer = config.optimizer
    dtype = dtype_of(config)
    settings = OptimizerConfig(
        # Of sgd and muon it keeps the state; their steps take the place of Adam's.
        optimizer="adam",
        decoupled_weight_decay=optimizer.kind != "adam",
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **_MOMENTS[optimizer.moments],
    )
    chunks = [chunk.module for chunk in ddp_chunks]
    overrides = parameter_groups.overrides(config, chunks, ages)
    built = get_megatron_optimizer(
        settings, list(ddp_chunks), config_overrides=overrides, use_gloo_process_groups=False
    )
    # Without anything trained but experts the part for all else is empty, on every rank, and
    # ``ChainedOptimizer._synchronize_steps`` reads the parameter groups that it does not have.
    parts = [part for part in built.chained_optimizers if not part.is_stub_optimizer]
    for part in parts:
        optimizer_state.own_whole_tensors(part)
        # ``step`` is called by megatron-core's ``step_with_ready_grads``.
        if optimizer.moments == "bfloat16":
            part.optimizer.step = partial(step_in_slices, part.optimizer)
        elif optimizer.kind == "sgd":
            part.optimizer.step = partial(sgd_step, part.optimizer, optimizer)
        elif optimizer.kind == "muon":
            part.optimizer.step = Muon(config, part, chunks).step
    return ChainedOptimizer(parts) if parts else built


SumsByPart = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""Sums the squares of norms by part of the model, of parameters and the norms."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The gradient of a step, before clipping.

    Args:
        norm: of the whole gradient, a scalar on the device, for which nobody has waited.
        by_part: the norms of the parts of the model, likewise.
        shards: gradients of this rank's shard of the weights.
    """

    norm: Tensor
    by_part: Tensor
    shards: list[Tensor]


@torch.no_grad()
def prepare_gradient(
    optimizer: MegatronOptimizer, sums_by_part: SumsByPart, device: torch.device
) -> Gradient:
    """Make the gradient ready for ``update_weights``, and compute its norm and those of the parts
    of the model. Collective: one all-reduce.
    """
    optimizer.prepare_grads()
    found = [pair for part in optimizer.chained_optimizers for pair in _gradients(part)]
    _clear_frozen(optimizer, found)
    counted = [pair for pair in found if counts_here(pair[0], optimizer)]
    norms = list(torch._foreach_norm([grad for _, grad in counted])) if counted else []
    total = torch.stack(norms or [torch.zeros((), device=device)]).square().sum()
    by_part = sums_by_part([owner for owner, _ in counted], norms)
    sums = torch.stack([total, *by_part])
    dist.all_reduce(sums, group=optimizer.get_grad_stats_parallel_group())
    roots = sums.sqrt()
    return Gradient(norm=roots[0], by_part=roots[1:], shards=[grad for _, grad in found])


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, gradient: Gradient, clip_grad: float) -> None:
    """Clip the gradient and update the weights. megatron-core's own ``step`` does the same as this
    and ``prepare_gradient``, but waits for the norm on the host.

    Args:
        optimizer: of megatron-core.
        gradient: what ``prepare_gradient`` returned.
        clip_grad: largest norm of the gradient; 0: no clipping.
    """
    if clip_grad and gradient.shards:
        factor = (clip_grad / (gradient.norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradient.shards, factor)
    optimizer.step_with_ready_grads()


def _gradients(optimizer: MegatronOptimizer) -> list[tuple[Tensor, Tensor]]:
    """Pair this rank's shard of the weights with its gradients; with 16-bit moments these belong to
    weights of another dtype.
    """
    name = "decoupled_grad" if optimizer.config.use_precision_aware_optimizer else "grad"
    found = [
        (parameter, getattr(parameter, name, None)) for parameter in optimizer.get_parameters()
    ]
    return [(parameter, grad) for parameter, grad in found if grad is not None]


def _clear_frozen(optimizer: MegatronOptimizer, found: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set the gradients of parameters that are not unfrozen yet to zero, so that their moments stay
    zero and the norm leaves them out.
    """
    frozen = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("is_frozen", False)
        for parameter in group["params"]
    }
    cleared = [grad for parameter, grad in found if id(parameter) in frozen]
    if cleared:
        torch._foreach_zero_(cleared)


def counts_here(parameter: Tensor, optimizer: MegatronOptimizer) -> bool:
    """Return whether a parameter or its gradient is counted on this rank: what several
    tensor-parallel ranks hold, or several layers share, counts once.
    """
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
        parameter, optimizer.chained_optimizers[0].tp_group
    )


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Take the state of a checkpoint. In float32 the master weights in it are the weights, of which
    each rank gets a shard: all are gathered, which the first step would not do without
    ``--parallel.overlap_param_gather``. Collective.
    """
    optimizer.load_state_dict(state)
    chunks = {
        id(chunk): chunk for part in optimizer.chained_optimizers for chunk in part.model_chunks
    }
    for chunk in chunks.values():
        chunk.start_param_sync(force_sync=True)


def oldest(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates that the oldest moments had seen before this run."""
    return max((age_of(group) for group in optimizer.param_groups), default=0)


def set_rates(
    optimizer: MegatronOptimizer,
    config: Config,
    step: int,
    skipped: int = 0,
    skipped_steps: Sequence[int] = (),
) -> float:
    """Set learning rate, weight decay, betas and epsilon of every parameter group for step
    ``step``, counted from 0.

    All groups count updates as the oldest does, and Adam divides both moments by one minus their
    decay to that power. Rates of a younger group undo that and put its own number of updates in
    place; SGD and Muon have nothing of the kind. A group that is not unfrozen yet has rate zero,
    and ``prepare_gradient`` clears its gradients.

    Args:
        optimizer: of megatron-core.
        config: the run.
        step: steps that are done.
        skipped: how many of these had no update.
        skipped_steps: their numbers, counted from 1.

    Returns:
        The learning rate of a group whose multiplier is 1.
    """
    settings = config.optimizer
    rate = learning_rate(step, settings, config.training.steps)
    shrinking = weight_decay(step, settings, config.training.steps)
    updates = step - skipped + 1
    most = oldest(optimizer) + updates
    for group in optimizer.param_groups:
        start = frozen_steps_of(group)
        before = start - sum(number <= start for number in skipped_steps)
        own = max(age_of(group) + updates - before, 1)
        first = 1.0
        second = 1.0
        if settings.kind != "sgd" and not group.get("is_muon", False):
            first = _correction(settings.adam_beta1, most) / _correction(settings.adam_beta1, own)
            second = math.sqrt(
                _correction(settings.adam_beta2, own) / _correction(settings.adam_beta2, most)
            )
        group["lr"] = rate * multiplier_of(group) * first * second
        group["weight_decay"] = shrinking * group["wd_mult"]
        if settings.kind != "adam":  # whose decay is part of the gradient
            group["weight_decay"] /= first * second
        group["eps"] = settings.adam_eps * second
        # A checkpoint's groups bring the betas of the run that wrote it.
        group["betas"] = (settings.adam_beta1, settings.adam_beta2)
        group["is_frozen"] = step < start
        if group["is_frozen"]:
            group["lr"] = 0.0
            group["weight_decay"] = 0.0
    return rate


def _correction(beta: float, updates: int) -> float:
    return 1 - beta**updates
