"""Optimizers with one moment instead of AdamW's two, inside megatron-core's distributed optimizer.

It allocates, saves and loads two moments of every parameter. The second one of these is a zero that
takes no memory; in checkpoints it takes what AdamW's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megavlm.config.schema import Optimizer


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return the first moment of a parameter, and let go of the second one, which is zero.

    Args:
        optimizer: the one inside megatron-core's.
        parameter: this rank's shard.
    """
    state = optimizer.state[parameter]
    if not state:
        state["exp_avg"] = torch.zeros_like(parameter)
    if "exp_avg_sq" not in state or state["exp_avg_sq"].stride() != (0,):
        # megatron-core makes it whole to load a checkpoint into it.
        state["exp_avg_sq"] = torch.zeros_like(parameter[:1]).expand(parameter.numel())
    return state["exp_avg"]


@torch.no_grad()
def sgd_step(optimizer: torch.optim.Optimizer, settings: Optimizer) -> None:
    """Update all parameters by SGD as torch's does; ``step_with_ready_grads`` of megatron-core
    calls this.

    Args:
        optimizer: the one inside megatron-core's, whose groups have the rates.
        settings: momentum.
    """
    for group in optimizer.param_groups:
        group["step"] = (group.get("step") or 0) + 1
        shards = [shard for shard in group["params"] if shard.grad is not None]
        if not shards:
            continue
        grads = [shard.grad for shard in shards]
        moments = [momentum_of(optimizer, shard) for shard in shards]
        torch._foreach_add_(grads, shards, alpha=group["weight_decay"])
        torch._foreach_mul_(moments, settings.sgd_momentum)
        torch._foreach_add_(moments, grads)
        if settings.sgd_nesterov:
            torch._foreach_add_(grads, moments, alpha=settings.sgd_momentum)
        torch._foreach_add_(shards, grads if settings.sgd_nesterov else moments, alpha=-group["lr"])
