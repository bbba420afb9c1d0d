"""Norms of the gradient and of the trained parameters, of each part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.config.cross_attention import is_cross_attention
from megavlm.config.freeze_mask import PARTS
from megavlm.config.lora import is_adapter
from megavlm.model.vlm import VisionLanguageModel
from megavlm.model.weights import named_weights
from megavlm.parallel.process_groups import Groups
from megavlm.train.meters import Figures, Meter
from megavlm.train.optimizer import counts_here
from megavlm.train.optimizer_state import master_of

NORM_PARTS = (*PARTS, "adapters", "cross_attention")
"""Parts whose norms are told apart. Adapters, and blocks of cross-attention, count for themselves
and not for what they stand in.
"""


def norm_part(key: str) -> str:
    """Return the part of ``NORM_PARTS`` that a checkpoint key counts for."""
    if is_adapter(key):
        return "adapters"
    return "cross_attention" if is_cross_attention(key) else key.split(".")[0]


class PartNorms(Meter):
    """Norms by part, over the shards of all ranks. Making it is collective.

    Args:
        chunks: this rank's.
        optimizer: of megatron-core, over what is trained of them.
        device: where the norms are.
    """

    def __init__(
        self,
        chunks: Sequence[VisionLanguageModel],
        optimizer: MegatronOptimizer,
        device: torch.device,
    ) -> None:
        self._device = device
        self._optimizer = optimizer
        keys = {
            id(parameter): key
            for chunk in chunks
            for key, parameter in named_weights(chunk).items()
        }
        self._part_of = {
            id(shard): norm_part(keys[id(parameter)])
            for parameter, shard in _shards(optimizer)
            if id(parameter) in keys
        }
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, set(self._part_of.values()))
        found = set().union(*everywhere)
        self.parts = [part for part in NORM_PARTS if part in found]
        self._gradient: Tensor | None = None

    def sums(self, parameters: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of squares of each of ``parts`` on this rank; nobody waits for the device.

        Args:
            parameters: of the optimizer, each to be counted once over all ranks.
            norms: of these parameters, or of their gradients.
        """
        of_parts: dict[str, list[Tensor]] = {part: [] for part in self.parts}
        for parameter, norm in zip(parameters, norms, strict=True):
            of_parts[self._part_of[id(parameter)]].append(norm)
        nothing = torch.zeros((), device=self._device)
        return [
            torch.stack(found).square().sum() if found else nothing for found in of_parts.values()
        ]

    def keep(self, gradient: Tensor) -> None:
        """Remember the norms of the gradient of a step that had an update.

        Args:
            gradient: over all ranks, in the order of ``parts``.
        """
        self._gradient = gradient

    @torch.no_grad()
    def report(self, groups: Groups, steps: int) -> Figures:
        """Return ``grad_norm``, of the last update's gradient before clipping, and ``param_norm``,
        of the trained parameters as they are, by part. Collective: one all-reduce, and one wait.
        """
        if not self.parts:
            return {}
        counted = [
            parameter
            for part in self._optimizer.chained_optimizers
            for parameter in part.get_parameters()
            if counts_here(parameter, self._optimizer)
        ]
        norms = torch._foreach_norm(counted, dtype=torch.float32) if counted else []
        sums = torch.stack(self.sums(counted, norms))
        dist.all_reduce(sums, group=self._optimizer.get_grad_stats_parallel_group())
        rows = [("param_norm", sums.sqrt())]
        if self._gradient is not None:
            rows.append(("grad_norm", self._gradient))
        values = torch.stack([row for _, row in rows]).tolist()
        self._gradient = None
        return {
            name: dict(zip(self.parts, row, strict=True))
            for (name, _), row in zip(rows, values, strict=True)
        }


def _shards(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the model's parameters of which this rank updates a shard, each with that shard."""
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter in part.model_param_group_index_map:
            yield parameter, master_of(part, parameter)
