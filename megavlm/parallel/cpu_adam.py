"""AdamW for the CPU, in the shape that megatron-core's distributed optimizer expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Adam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose step count lives in the parameter
    group.

    The fused optimizers of Apex and Transformer Engine keep it there, and megatron-core relies on
    it to save a rank that has nothing to train and to load state saved at another layout; torch's
    own AdamW counts in every parameter's state and fails at both.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented")
        if capturable:
            raise ValueError("a CPU has no CUDA graphs to be captured in")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict) -> None:
        (beta1, beta2) = group["betas"]
        step = group["step"]
        lr = group["lr"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        averages = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(squares, 1 - beta2**step)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, averages, denominators, -lr / (1 - beta1**step))
