"""Compare master weights with the model's weights, at every save and every load of an optimizer.

megatron-core cuts the optimizer's part of a checkpoint out of flat gradient buckets. A mistake
there shows nowhere else: the file is whole, its checksums are right, the model's weights beside it
are right, and the resumed run trains other weights. But a master weight, rounded, is the model's
weight, so both are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from torch import Tensor

from megavlm.train.optimizer_state import MASTER, weight_of_master

# Values compared at a time, so that the comparison needs no memory worth naming.
_PIECE = 1 << 24
_SHOWN = 5


class MismatchError(ValueError):
    """Master weights that are not the model's weights; every rank raises it."""


@dataclass(frozen=True, kw_only=True)
class Master:
    """A parameter, and where its master weight is in the optimizer's state.

    Args:
        key: checkpoint key of the parameter.
        weight: the parameter, as much of it as this rank holds.
        part: number of the optimizer's part.
        index: number of the parameter in that part.
    """

    key: str
    weight: Tensor
    part: int
    index: int

    def find(self, parts: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the master weight in a state that is to be written or was read."""
        found = parts[self.part]["param_state"][self.index][MASTER]
        return found.data if isinstance(found, ShardedBase) else found


def masters(weights: ShardedStateDict, parts: Sequence[Mapping[str, Any]]) -> list[Master]:
    """Find every parameter of which this rank has the master weight as a whole.

    Args:
        weights: the model's part of what is saved or loaded.
        parts: the optimizer's, made from the same ``weights``; see ``optimizer_parts``.
    """
    by_place = {_place(entry.key, entry): entry.data for entry in weights.values()}
    found = []
    for number, part in enumerate(parts):
        for index, entries in part["param_state"].items():
            if (entry := entries.get(MASTER)) is not None:
                key = weight_of_master(entry)
                weight = by_place[_place(key, entry)]
                found.append(Master(key=key, weight=weight, part=number, index=index))
    return found


def _place(key: str, entry: ShardedBase) -> tuple[str, Any]:
    """Name an entry by its key and its offset in the whole tensor, if it has one already."""
    return key, vars(entry).get("global_offset")


@torch.no_grad()
def differences(
    found: Sequence[Master],
    parts: Sequence[Mapping[str, Any]],
    written: Callable[[str], torch.dtype | None],
) -> dict[str, int]:
    """Count, by key, the values that differ from the rounded master weights.

    Args:
        found: the parameters to compare.
        parts: of the optimizer's state that is to be written or was read.
        written: takes a key and returns the dtype that the weight has in the checkpoint; None: the
            model's.
    """
    counts = [_count(master, master.find(parts).flatten(), written(master.key)) for master in found]
    numbers = torch.stack(counts).tolist() if counts else []
    wrong: dict[str, int] = {}
    for master, number in zip(found, numbers, strict=True):
        if number:
            wrong[master.key] = wrong.get(master.key, 0) + number
    return wrong


def _count(master: Master, values: Tensor, written: torch.dtype | None) -> Tensor:
    weight = master.weight.detach().flatten()
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, weight.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        rounded = values[piece].to(weight.device).to(written or weight.dtype).to(weight.dtype)
        count += (rounded != weight[piece]).sum()
    return count


def refuse(wrong: Mapping[str, int]) -> None:
    """Raise on every rank if any rank found something. Collective.

    Args:
        wrong: what ``differences`` found on this rank.

    Raises:
        MismatchError: a rank found a difference.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, dict(wrong))
    total: dict[str, int] = {}
    for counts in everywhere:
        for key, count in counts.items():
            total[key] = total.get(key, 0) + count
    if total:
        listed = ", ".join(f"{key} ({total[key]:,} values)" for key in list(total)[:_SHOWN])
        more = f" and {len(total) - _SHOWN} more" if len(total) > _SHOWN else ""
        raise MismatchError(
            f"the master weights of {len(total)} tensors, rounded, are not the weights:"
            f" {listed}{more}"
        )
