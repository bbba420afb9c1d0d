"""Learning rate, weight decay and drop path rate of every step, as pure functions of the step."""

from __future__ import annotations

import math

from megavlm.config.schema import Optimizer, Training


def learning_rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """Return the learning rate of update ``step``, counted from 0.

    The rate of a parameter group is this one times the group's multiplier, at every step, as
    transformers does it; timm's schedulers share the initial and the lowest rate among all groups.

    Args:
        step: updates that are done.
        optimizer: the settings.
        steps: training steps of the run.
    """
    warmup = optimizer.warmup(steps)
    if step < warmup:
        first = optimizer.warmup_init_lr
        return first + (optimizer.lr - first) * step / warmup
    lowest = optimizer.lowest_lr
    end = optimizer.decay_steps or steps
    start = warmup if optimizer.counted_from == "warmup" else 0
    progress = min((step - start) / max(end - start, 1), 1.0)
    match optimizer.schedule:
        case "constant":
            return optimizer.lr
        case "step":
            drops = (step - start) // optimizer.step_interval
            return max(optimizer.lr * optimizer.step_factor**drops, lowest)
        case "inverse-square-root":
            timescale = optimizer.timescale or warmup
            return max(optimizer.lr / math.sqrt((step - warmup + timescale) / timescale), lowest)
        case "WSD":
            factor = _wsd_factor(step - (end - optimizer.wsd_decay_steps), optimizer)
        case "cosine":  # Loshchilov and Hutter, arXiv 1608.03983, without restarts
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            factor = 1 - progress
        case "polynomial":
            factor = (1 - progress) ** optimizer.power
    return lowest + (optimizer.lr - lowest) * factor


def _wsd_factor(decayed: int, optimizer: Optimizer) -> float:
    """Return the share of the rate that is left, from 1 to 0, after ``decayed`` steps of the decay
    (Hu et al., arXiv 2404.06395; Hägele et al., arXiv 2405.18392, for minus_sqrt).
    """
    progress = min(max(decayed, 0) / optimizer.wsd_decay_steps, 1.0)
    match optimizer.wsd_decay:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "minus_sqrt":
            return 1 - math.sqrt(progress)
        case "exponential":
            return 2 * 0.5**progress - 1


def weight_decay(step: int, optimizer: Optimizer, steps: int) -> float:
    """Return the weight decay of update ``step``, counted from 0; as in Megatron-LM, it would
    reach its end one step after the last.
    """
    return _between(
        optimizer.weight_decay,
        optimizer.end_weight_decay,
        step / steps,
        optimizer.weight_decay_schedule,
    )


def drop_path(step: int, training: Training, frozen_steps: int) -> float:
    """Return the drop path rate of the last layer in update ``step``, counted from 0; 0 in the
    first ``frozen_steps``, in which the vision encoder is frozen.
    """
    if step < frozen_steps:
        return 0.0
    progress = step / max(training.steps - 1, 1)
    return _between(
        training.drop_path, training.end_drop_path, progress, training.drop_path_schedule
    )


def _between(first: float, last: float, progress: float, schedule: str) -> float:
    """Return the value after a share of the steps, on a line or half a cosine."""
    if schedule == "constant":
        return first
    progress = min(progress, 1.0)
    if schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return first + progress * (last - first)
