"""Settings of the optimizer and of the schedules of its learning rate and weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Schedule = Literal[
    "cosine", "linear", "polynomial", "step", "constant", "WSD", "inverse-square-root"
]

Kind = Literal["adamw", "adam", "sgd", "muon"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer, and the schedules of its learning rate and weight decay.

    Args:
        kind: what updates the parameters. adamw; adam: with the weight decay in the gradient; sgd:
            with momentum, and the weight decay in the gradient; muon: matrices of the layers get
            orthogonal updates, everything else AdamW's.
        lr: peak learning rate.
        min_lr: lowest learning rate after the warm-up, which the schedule ends at.
        min_lr_ratio: the same as a share of ``lr``; instead of ``min_lr``.
        warmup_steps: steps of linear warm-up; if above 0, it overrides ``warmup_ratio``.
        warmup_ratio: warm-up as a share of the training steps.
        warmup_init_lr: learning rate at the first step of the warm-up.
        schedule: learning rate after the warm-up. cosine, linear, polynomial: falls to the lowest
            rate; step: is multiplied by ``step_factor`` every ``step_interval`` steps; WSD: stays,
            and falls to the lowest rate over the last ``wsd_decay_steps`` steps;
            inverse-square-root: falls with 1/sqrt(step); constant: stays.
        decay_steps: step at which cosine, linear, polynomial and WSD reach the lowest rate; 0: the
            last training step.
        counted_from: where cosine, linear, polynomial and step begin to count: at the end of the
            warm-up, or at the first step (start), which makes the rate jump at the end of the
            warm-up.
        step_interval: steps between two reductions of step.
        step_factor: factor of one reduction of step.
        power: exponent of polynomial.
        timescale: steps of inverse-square-root after which the rate has fallen by the square root
            of 2, counted from the end of the warm-up; 0: the steps of the warm-up.
        wsd_decay_steps: steps of the decay of WSD.
        wsd_decay: how WSD decays.
        weight_decay: weight decay at the first step; decoupled with adamw and muon.
        weight_decay_schedule: how the weight decay goes from ``weight_decay`` to
            ``end_weight_decay`` over the training steps.
        end_weight_decay: weight decay at the last step, unless it is constant.
        decay: trainable parameters with weight decay: all, as in InternVL's recipe; matrices only
            (no norms, biases or layer scales); or, as a vision model lists them, matrices but no
            class and position embeddings, query tokens, latents and temperatures (model).
        no_decay: parameters without weight decay: parts or patterns of names, as for
            ``training.trainable``.
        lr_multipliers: learning rate of parts or of patterns of names, as a multiple of ``lr``,
            such as ``vision=0.1,connector=10``; of several that name a parameter the last counts.
        vision_layer_decay: factor of the learning rate between a layer of the vision encoder and
            the layer after it; the last of L layers has it once, the first L times, the patch and
            position embeddings L + 1 times. It multiplies ``lr_multipliers``.
        language_layer_decay: the same for the language model; its embedding has it L + 1 times, its
            last norm and its head never.
        adam_beta1: decay of the first moment of adamw, adam, and of muon's AdamW.
        adam_beta2: decay of the second moment of the same.
        adam_eps: added to the square root of the second moment of the same.
        sgd_momentum: share of the last update of sgd that stays in the next one.
        sgd_nesterov: sgd's step looks ahead by another momentum (Nesterov), as in InternVL's
            classification code.
        muon_momentum: decay of muon's moving average of the gradient.
        muon_scale: root mean square of muon's update of a matrix, as a multiple of the learning
            rate; 0.2 is about AdamW's (arXiv 2502.16982), so that both share one learning rate.
        clip_grad: clip the gradient to this global norm; 0: no clipping.
        moments: dtype of both moments; bfloat16 saves four bytes a trainable parameter and needs
            Transformer Engine.
    """

    kind: Kind = "adamw"
    lr: float = 2e-4
    min_lr: float = 0.0
    min_lr_ratio: float = 0.0
    warmup_steps: int = 0
    warmup_ratio: float = 0.03
    warmup_init_lr: float = 0.0
    schedule: Schedule = "cosine"
    decay_steps: int = 0
    counted_from: Literal["warmup", "start"] = "warmup"
    step_interval: int = 0
    step_factor: float = 0.1
    power: float = 1.0
    timescale: int = 0
    wsd_decay_steps: int = 0
    wsd_decay: Literal["linear", "cosine", "minus_sqrt", "exponential"] = "minus_sqrt"
    weight_decay: float = 0.05
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = "constant"
    end_weight_decay: float = 0.0
    decay: Literal["all", "matrices", "model"] = "all"
    no_decay: tuple[str, ...] = ()
    lr_multipliers: tuple[str, ...] = ()
    vision_layer_decay: float = 1.0
    language_layer_decay: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.9
    sgd_nesterov: bool = False
    muon_momentum: float = 0.95
    muon_scale: float = 0.2
    clip_grad: float = 1.0
    moments: Literal["float32", "bfloat16"] = "float32"

    @property
    def is_adam(self) -> bool:
        """Whether every parameter has two moments."""
        return self.kind in ("adamw", "adam")

    @property
    def decays(self) -> bool:
        """Whether any step has weight decay."""
        return self.weight_decay > 0 or self.end_weight_decay > 0

    @property
    def lowest_lr(self) -> float:
        """Lowest learning rate after the warm-up."""
        return self.min_lr or self.min_lr_ratio * self.lr

    def warmup(self, steps: int) -> int:
        """Return the steps of the warm-up of a run of ``steps`` steps: the given number, else the
        given share of them, rounded up.
        """
        ratio = self.warmup_ratio if 0 <= self.warmup_ratio <= 1 else 0.0  # others are refused
        return self.warmup_steps or math.ceil(ratio * steps)
