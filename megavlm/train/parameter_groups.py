"""Parameter groups: parameters of one learning rate multiplier, weight decay, age and optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megavlm.config.lora import MAGNITUDE, is_adapter
from megavlm.config.parameter_groups import decays, is_orthogonalised, multiplier
from megavlm.config.schema import Config
from megavlm.config.unfreezing import frozen_steps
from megavlm.model.vlm import VisionLanguageModel
from megavlm.model.weights import named_weights

Traits = tuple[float, int, bool, int, bool]
"""Multiplier of the learning rate, updates that the moments saw before this run, weight decay,
steps of this run in which the group is frozen, and whether Muon updates it."""


def overrides(
    config: Config,
    chunks: Sequence[VisionLanguageModel],
    ages: Mapping[int, int],
) -> dict[ParamKey, ParamGroupOverride]:
    """Return what sets each group apart, for megatron-core's ``get_megatron_optimizer``.
    Collective.

    megatron-core tells groups apart by lr_mult, among others, when it loads them, and does nothing
    else with it: it is the number of the group, the same on every rank. What the group's rates are
    made of goes beside it, under names of our own.

    Args:
        config: the run.
        chunks: this rank's.
        ages: updates that the moments of each parameter have seen before this run, by ``id``.
    """
    traits: dict[int, Traits] = {}
    for chunk in chunks:
        for key, parameter in named_weights(chunk).items():
            if parameter.requires_grad:
                traits[id(parameter)] = (
                    multiplier(key, config.optimizer, config.architecture),
                    ages.get(id(parameter), 0),
                    decays(
                        key,
                        config.optimizer,
                        is_matrix=parameter.squeeze().ndim > 1
                        or (is_adapter(key) and not key.endswith(MAGNITUDE)),
                    ),
                    frozen_steps(key, config.training),
                    is_orthogonalised(key, config.optimizer.kind),
                )
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, set(traits.values()))
    found = sorted(set().union(*everywhere))
    usual = (1.0, 0, True, 0, False)
    return {
        _parameters_of(group, traits): ParamGroupOverride(
            lr_mult=2.0 + number,
            wd_mult=float(group[2]),
            rate_multiplier=group[0],
            age=group[1],
            frozen_steps=group[3],
            is_muon=group[4],
        )
        for number, group in enumerate(found)
        if group != usual
    }


def _parameters_of(group: Traits, traits: Mapping[int, Traits]) -> ParamKey:
    return ParamKey(
        predicate=ParamPredicate(
            name=f"group {group}", fn=lambda parameter: traits.get(id(parameter)) == group
        )
    )


def age_of(group: Mapping[str, Any]) -> int:
    """Return the updates that the moments of a group saw before this run."""
    return group.get("age", 0)


def multiplier_of(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group, as a multiple of the run's."""
    return group.get("rate_multiplier", 1.0)


def frozen_steps_of(group: Mapping[str, Any]) -> int:
    """Return the steps of the run in which a group is frozen."""
    return group.get("frozen_steps", 0)
