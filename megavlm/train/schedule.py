"""The learning rate of every step, as a pure function."""

from __future__ import annotations

import math

from megavlm.config.schema import Optimizer


def warmup_steps(optimizer: Optimizer, steps: int) -> int:
    """Return the steps of warm-up: the given number, else the given share of the training steps,
    rounded up.
    """
    return optimizer.warmup_steps or math.ceil(optimizer.warmup_ratio * steps)


def learning_rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """Learning rate of update ``step``, counted from 0.

    It rises linearly from 0 over the warm-up, then falls on half a cosine to ``min_lr`` or stays
    (Loshchilov and Hutter, arXiv 1608.03983, without restarts). As in InternVL's recipe, the very
    first update of a warm-up has a learning rate of 0.
    """
    warmup = warmup_steps(optimizer, steps)
    if step < warmup:
        return optimizer.lr * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
