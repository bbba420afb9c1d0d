"""Compare master weights with the model's weights, at every save and every load of an optimizer.

megatron-core cuts the optimizer's part of a checkpoint out of flat gradient buckets. A mistake
there shows nowhere else: the file is whole, its checksums are right, the model's weights beside it
are right, and the resumed run trains other weights. But a master weight, rounded, is the model's
weight, so both are compared.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

_STATE = "optimizer.state.param."
_LIBRARY = "megatron.core.optimizer.distrib_optimizer"
_LIBRARY_WARNING = "exceeds unpadded buffer"
# Values compared at a time, so that the comparison needs no memory worth naming.
_PIECE = 1 << 24
_SHOWN = 5


class MismatchError(ValueError):
    """Master weights that are not the model's weights; every rank raises it."""


@dataclass(frozen=True, kw_only=True)
class Master:
    """A parameter, and where its master weight is in the state dict of the optimizer.

    Args:
        key: checkpoint key of the parameter.
        weight: the parameter, as much of it as this rank holds.
        path: keys that lead to the master weight.
        group: ranks that hold the same parameter; each compares its share of the values.
    """

    key: str
    weight: Tensor
    path: tuple[Any, ...]
    group: dist.ProcessGroup

    def find(self, state: Mapping[Any, Any]) -> Tensor:
        """Return the master weight in a state dict that is to be written or was read."""
        found: Any = state
        for name in self.path:
            found = found[name]
        return found.data if isinstance(found, ShardedBase) else found


def masters(
    weights: ShardedStateDict, state: Mapping[Any, Any], optimizer: MegatronOptimizer
) -> list[Master]:
    """Find every parameter that has a master weight.

    Args:
        weights: the model's part of what is saved or loaded.
        state: the optimizer's part, made from the same ``weights``.
        optimizer: the optimizer that made it.
    """
    by_place = {_place(entry.key, entry): entry.data for entry in weights.values()}
    parts = optimizer.chained_optimizers
    found = []
    for number, part in enumerate(parts):
        above = () if len(parts) == 1 else (number,)
        part_state = state[number] if above else state
        for index, entries in part_state["param_state"].items():
            if (entry := entries.get("param")) is not None:
                key = entry.key.rpartition(_STATE)[2]
                path = (*above, "param_state", index, "param")
                weight = by_place[_place(key, entry)]
                found.append(
                    Master(key=key, weight=weight, path=path, group=part.data_parallel_group)
                )
    return found


def _place(key: str, entry: ShardedBase) -> tuple[str, Any]:
    """Name an entry by its key and its offset in the whole tensor, if it has one already."""
    return key, vars(entry).get("global_offset")


@torch.no_grad()
def differences(
    found: Sequence[Master], state: Mapping[Any, Any], written: Callable[[str], torch.dtype | None]
) -> dict[str, int]:
    """Count, by key, the values of this rank's shares that differ from the rounded master weights.

    Args:
        found: the parameters to compare.
        state: the optimizer's part of what is to be written or was read.
        written: takes a key and returns the dtype that the weight has in the checkpoint; None: the
            model's.
    """
    counts = [_count(master, master.find(state).flatten(), written(master.key)) for master in found]
    numbers = torch.stack(counts).tolist() if counts else []
    wrong: dict[str, int] = {}
    for master, number in zip(found, numbers, strict=True):
        if number:
            wrong[master.key] = wrong.get(master.key, 0) + number
    return wrong


def _count(master: Master, values: Tensor, written: torch.dtype | None) -> Tensor:
    weight = master.weight.detach().flatten()
    rank = master.group.rank()
    size = master.group.size()
    end = (rank + 1) * weight.numel() // size
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(rank * weight.numel() // size, end, _PIECE):
        piece = slice(start, min(start + _PIECE, end))
        rounded = values[piece].to(weight.device).to(written or weight.dtype).to(weight.dtype)
        count += (rounded != weight[piece]).sum()
    return count


@contextlib.contextmanager
def library_warnings() -> Iterator[list[str]]:
    """Collect megatron-core's warnings that it fills the optimizer's state with zeros."""
    listener = _Listener()
    logger = logging.getLogger(_LIBRARY)
    logger.addHandler(listener)
    try:
        yield listener.found
    finally:
        logger.removeHandler(listener)


class _Listener(logging.Handler):
    """Keeps the warnings about state that does not fit its buffer."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the library's warning; the logger calls this for every record."""
        if _LIBRARY_WARNING in record.getMessage():
            self.found.append(record.getMessage())


def refuse(wrong: Mapping[str, int], warnings: Sequence[str] = ()) -> None:
    """Raise on every rank if any rank found something. Collective.

    Args:
        wrong: what ``differences`` found on this rank.
        warnings: what ``library_warnings`` collected on this rank.

    Raises:
        MismatchError: a rank found a difference or had a warning.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (dict(wrong), list(warnings)[:1]))
    total: dict[str, int] = {}
    for counts, _ in everywhere:
        for key, count in counts.items():
            total[key] = total.get(key, 0) + count
    told = [text for _, texts in everywhere for text in texts]
    if total:
        listed = ", ".join(f"{key} ({total[key]:,} values)" for key in list(total)[:_SHOWN])
        more = f" and {len(total) - _SHOWN} more" if len(total) > _SHOWN else ""
        raise MismatchError(
            f"the master weights of {len(total)} tensors, rounded, are not the weights:"
            f" {listed}{more}"
        )
    if told:
        raise MismatchError(
            f"megatron-core could not cut the optimizer's state out of its buffers: {told[0]}"
        )
