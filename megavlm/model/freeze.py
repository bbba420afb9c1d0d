"""Freeze masks: which weights a stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megavlm.checkpoint.shared_loading import is_of_experts
from megavlm.config.freeze_mask import PARTS, matches
from megavlm.config.schema import Training
from megavlm.config.unfreezing import frozen_steps
from megavlm.model.vlm import VisionLanguageModel
from megavlm.model.weights import named_weights, weight_sizes


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a freeze mask leaves to train, over the whole model.

    Args:
        weights: trainable parameters of each part.
        total: parameters of each part.
        frozen_steps: steps of the run in which nothing of each part is trained yet.
    """

    weights: dict[str, int]
    total: dict[str, int]
    frozen_steps: dict[str, int]


def apply(chunks: Sequence[VisionLanguageModel], training: Training) -> Trained:
    """Freeze every weight that no pattern of the freeze mask means. Collective; call it before DDP
    and the optimizer are built.

    Args:
        chunks: this rank's.
        training: ``trainable`` has parts, or patterns of checkpoint keys with ``*``, ``?``, ``[]``.

    Raises:
        ValueError: a pattern means no weight on any rank; every rank raises it.
    """
    used: set[str] = set()
    found: dict[int, dict[str, tuple[int, bool]]] = {}
    for chunk in chunks:
        whole = weight_sizes(chunk)
        sizes = found.setdefault(chunk.number, {})
        for key, parameter in named_weights(chunk).items():
            patterns = {pattern for pattern in training.trainable if matches(key, pattern)}
            parameter.requires_grad_(bool(patterns))
            used |= patterns
            sizes[key] = whole[key], bool(patterns)
    groups = chunks[0].groups.collection
    whole_model = groups.tp_ep_pp  # ranks that have all layers and all experts between them
    everywhere: list = [None] * whole_model.size()
    dist.all_gather_object(everywhere, (used, found), group=whole_model)
    unused = set(training.trainable) - set().union(*(seen for seen, _ in everywhere))
    if unused:
        listed = ", ".join(sorted(unused))
        raise ValueError(
            f"--training.trainable: nothing in the model is called {listed}; parts are"
            f" {', '.join(PARTS)}"
        )
    numbered = [(number, sizes) for _, found in everywhere for number, sizes in found.items()]
    merged = {key: size for _, sizes in numbered for key, size in sizes.items()}
    waiting: dict[str, list[int]] = {part: [] for part in PARTS}
    for key, (_, is_trained) in merged.items():
        if is_trained:
            waiting[key.split(".")[0]].append(frozen_steps(key, training))
    first_trained = min(
        number for number, sizes in numbered if any(trained for _, trained in sizes.values())
    )
    train_experts = {
        number
        for number, sizes in numbered
        if any(trained and is_of_experts(key) for key, (_, trained) in sizes.items())
    }
    for chunk in chunks:
        chunk.trains_vision = bool(waiting["vision"])
        chunk.first_trained = first_trained
        shares = max(groups.ep.size(), groups.expt_tp.size()) > 1
        chunk.shares_trained_experts = shares and chunk.number in train_experts
    return Trained(
        weights=_by_part(merged, trained_only=True),
        total=_by_part(merged, trained_only=False),
        frozen_steps={part: min(steps, default=0) for part, steps in waiting.items()},
    )


def _by_part(sizes: dict[str, tuple[int, bool]], *, trained_only: bool) -> dict[str, int]:
    chosen = [
        (key.split(".")[0], size)
        for key, (size, trained) in sizes.items()
        if trained or not trained_only
    ]
    return {part: sum(size for owner, size in chosen if owner == part) for part in PARTS}
