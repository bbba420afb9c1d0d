"""An optimizer's update in slices of its parameters, to bound the memory of its temporary copies.

Transformer Engine's FusedAdam copies both bfloat16 moments of a whole parameter group to float32
inside ``step`` and frees them at the end: eight bytes for each trainable parameter, at the moment
at which gradients are still there. Updated slice by slice, only one slice's copies exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megavlm.planner.memory import UPDATE_SLICE


def slices(parameters: Sequence[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Cut a list of parameters into runs of at most ``elements`` elements, or of one parameter."""
    run: list[Tensor] = []
    count = 0
    for parameter in parameters:
        if run and count + parameter.numel() > elements:
            yield run
            run = []
            count = 0
        run.append(parameter)
        count += parameter.numel()
    if run:
        yield run


def step_in_slices(optimizer: torch.optim.Optimizer, elements: int = UPDATE_SLICE) -> None:
    """Update all parameters, as one ``step`` of the class would, a slice at a time.

    ``step`` sees the parameters of one slice of one group, and the group's old count of updates, so
    that every slice has the same bias correction.

    Args:
        optimizer: whose groups count their updates under ``step``, as FusedAdam's do.
        elements: elements of a slice.
    """
    groups = optimizer.param_groups
    whole = [list(group["params"]) for group in groups]
    before = [group.get("step") for group in groups]
    after: list[int | None] = list(before)
    try:
        for group in groups:
            group["params"] = []
        for number, parameters in enumerate(whole):
            for run in slices(parameters, elements):
                _set_counts(groups, before)
                groups[number]["params"] = run
                type(optimizer).step(optimizer)
                after[number] = groups[number]["step"]
            groups[number]["params"] = []
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters
        _set_counts(groups, after)


def _set_counts(groups: Sequence[dict[str, Any]], counts: Sequence[int | None]) -> None:
    for group, count in zip(groups, counts, strict=True):
        if count is None:
            group.pop("step", None)
        else:
            group["step"] = count
