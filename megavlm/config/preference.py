"""The objective preference: its losses and their weights.

Mixed preference optimization (MPO, arXiv 2411.10442, section 4) adds up three losses of a pair of
answers; with one weight above 0 it is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

READINGS = ("reward_chosen", "reward_rejected", "reward_accuracy", "reward_shift")


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The objective preference: a chosen answer against a rejected one. The reward of an answer is
    beta times the logarithm of its probability over that which the reference model gives it.

    Args:
        beta: factor of rewards.
        dpo: weight of the loss of the difference between both rewards (Rafailov et al., arXiv
            2305.18290); a loss of weight 0 is measured only.
        bco: weight of the loss of each reward by itself, compared with the mean of all rewards
            before the step (Jung et al., arXiv 2404.04656).
        sft: weight of the cross-entropy of the chosen answer, the mean over its tokens.
        label_smoothing: share of the pairs whose answers are taken to be the wrong way round
            (conservative DPO); of dpo in training, held-out losses have none.
    """

    beta: float = 0.1
    dpo: float = 0.8
    bco: float = 0.2
    sft: float = 1.0
    label_smoothing: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """The losses by name, with their weights."""
        return {"dpo": self.dpo, "bco": self.bco, "sft": self.sft}


def problems(arch: Any) -> Iterator[str]:
    """Yield what is wrong with the settings."""
    settings: Preference = arch.preference
    flag = "--architecture.preference"
    if not 0 < settings.beta < math.inf:
        yield f"{flag}.beta {settings.beta}: must be above 0"
    for name, weight in settings.weights.items():
        if not 0 <= weight < math.inf:
            yield f"{flag}.{name} {weight}: must be 0 or more"
    if not any(settings.weights.values()):
        yield f"{flag}.dpo, .bco and .sft are all 0, so nothing would be trained"
    if not 0 <= settings.label_smoothing < 0.5:
        yield f"{flag}.label_smoothing {settings.label_smoothing}: must be from 0 to below 0.5"
    if settings.label_smoothing and not settings.dpo:
        yield (
            f"{flag}.label_smoothing {settings.label_smoothing} has no effect: {flag}.dpo is 0; use"
            " 0"
        )
