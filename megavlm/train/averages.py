"""An exponential moving average of the trained parameters (Polyak and Juditsky, 1992).

Each data-parallel rank averages its own shard of the master weights. A checkpoint holds the whole
averages, at any layout: for a moment they take the place of the master weights, and megatron-core
gathers them as it gathers those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.config.averages import Ema

PREFIX = "ema."
"""Begins the keys of averages in a checkpoint, before those of the parameters."""
_STATE = "optimizer.state.param."


@dataclass(frozen=True, kw_only=True)
class Averages:
    """The averages of this rank's shard of the parameters.

    Args:
        settings: of the average.
        optimizer: of megatron-core, whose master weights are averaged.
        shards: the averages, in the order of the optimizer.
    """

    settings: Ema
    optimizer: MegatronOptimizer
    shards: list[Tensor]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take the master weights into the averages, after an update.

        Args:
            updates: that were done before that one.
        """
        decay = self.settings.decay_at(updates)
        if self.shards:
            torch._foreach_lerp_(self.shards, _masters(self.optimizer), 1 - decay)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Let averages and master weights change places."""
        for average, parameter in zip(self.shards, _masters(self.optimizer), strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)

    @contextlib.contextmanager
    def in_master_weights(self) -> Iterator[None]:
        """Hold the averages in the place of the master weights inside the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextlib.contextmanager
    def in_model(self, ddp_chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
        """Compute with the averages inside the context. Collective; call it in
        ``optimizer.whole_weights``.
        """
        with self.in_master_weights():
            self._spread(ddp_chunks)
            yield
        self._spread(ddp_chunks)

    def _spread(self, ddp_chunks: Sequence[DistributedDataParallel]) -> None:
        """Give all ranks the model's weights as the master weights now are."""
        for part in self.optimizer.chained_optimizers:
            part._copy_main_params_to_model_params()
        for chunk in ddp_chunks:
            chunk.start_param_sync(force_sync=True)

    def take_master_weights(self) -> None:
        """Begin the averages anew, or take what was loaded in the place of the master weights."""
        for average, parameter in zip(self.shards, _masters(self.optimizer), strict=True):
            average.copy_(parameter.detach())

    def sharded(self, state_of: Callable[[], dict[Any, Any]]) -> dict[str, ShardedBase]:
        """Return the averages as megatron-core saves them. Collective.

        Args:
            state_of: returns the sharded state of the optimizer.
        """
        with self.in_master_weights():
            return entries(state_of(), self.optimizer)


def entries(state: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[str, ShardedBase]:
    """Return the entries of master weights in an optimizer's state under the keys of averages, by
    number of the part of the optimizer and of the parameter.
    """
    found = {}
    for place, tensors in parameter_states(state, optimizer):
        if "param" in tensors:
            entry = tensors["param"]
            key = PREFIX + entry.key.rpartition(_STATE)[2]
            found[place] = replace(entry, key=key, data=entry.data.clone())
    return found


def _masters(optimizer: MegatronOptimizer) -> list[Tensor]:
    return [one for part in optimizer.chained_optimizers for one in part.get_parameters()]


def parameter_states(
    state: dict[Any, Any], optimizer: MegatronOptimizer
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the master weight and moments of each parameter in an optimizer's state, with its
    place.
    """
    parts = optimizer.chained_optimizers
    for number in range(len(parts)):
        own = state if len(parts) == 1 else state.get(number, {})
        for index, tensors in own.get("param_state", {}).items():
            yield f"{number} {index}", tensors


def build(settings: Ema, optimizer: MegatronOptimizer) -> Averages | None:
    """Begin averages at the parameters as they are; none if they are not asked for."""
    if not settings.decay:
        return None
    shards = [parameter.detach().clone().float() for parameter in _masters(optimizer)]
    return Averages(settings=settings, optimizer=optimizer, shards=shards)


def begin_again(averaged: Averages | None) -> None:
    """Begin averages, if there are any, at master weights that were loaded meanwhile."""
    if averaged is not None:
        averaged.take_master_weights()
