"""Adam and AdamW of torch operations, in the shape that megatron-core's distributed optimizer
expects.

It serves CPUs, and GPUs on which neither Transformer Engine nor Apex is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Adam(torch.optim.Optimizer):
    """Adam, and AdamW (Loshchilov and Hutter, arXiv 1711.05101), whose step count lives in the
    parameter group.

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
        if capturable:
            raise ValueError("this optimizer cannot be captured in a CUDA graph")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        (beta1, beta2) = group["betas"]
        step = group["step"]
        lr = group["lr"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        averages = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        if self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        else:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        denominators = torch._foreach_div(squares, 1 - beta2**step)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(params, averages, denominators, -lr / (1 - beta1**step))


def install() -> None:
    """Give megatron-core this optimizer instead of torch's own AdamW.

    ``get_megatron_optimizer`` reads these names when it builds an optimizer; the distributed
    optimizer reads them when it saves and loads its state.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = Adam
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True
    distributed.USING_TE_OPTIMIZER = False


def install_if_none_is_fused() -> None:
    """Install this optimizer if megatron-core found neither Transformer Engine's nor Apex's."""
    import megatron.core.optimizer as optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        install()
