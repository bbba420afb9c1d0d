"""An exponential moving average of the trained parameters (Polyak and Juditsky, 1992).

Each data-parallel rank averages its own shard of the master weights. A checkpoint holds the whole
averages, at any layout: for a moment they take the place of the master weights, and are gathered as
those are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megavlm.config.averages import Ema
from megavlm.train import optimizer_state
from megavlm.train.optimizer_state import MASTER

PREFIX = "ema."
"""Begins the keys of averages in a checkpoint, before those of the parameters."""


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
        """Begin the averages anew."""
        for average, parameter in zip(self.shards, _masters(self.optimizer), strict=True):
            average.copy_(parameter.detach())

    def take(self, whole: Mapping[str, Tensor]) -> None:
        """Take averages that were loaded. Collective.

        Args:
            whole: those of the parameters that this rank owns, by name as of ``sharded``.
        """
        shards = {
            id(master): shard
            for master, shard in zip(_masters(self.optimizer), self.shards, strict=True)
        }
        for number, part in enumerate(self.optimizer.chained_optimizers):
            own = {
                int(name.split()[1]): {MASTER: tensor}
                for name, tensor in whole.items()
                if name.split()[0] == str(number)
            }
            for parameter, tensors in optimizer_state.scatter(part, own, [MASTER]):
                shards[id(optimizer_state.master_of(part, parameter))].copy_(tensors[MASTER])

    def sharded(self, weights: ShardedStateDict, *, is_loading: bool) -> dict[str, ShardedBase]:
        """Return the averages of the parameters that this rank owns, as megatron-core saves and
        loads them, by number of the part of the optimizer and of the parameter. Collective unless
        ``is_loading``.

        Args:
            weights: the model's part of what is saved or loaded.
            is_loading: leave room for the averages instead of gathering them.
        """
        with contextlib.nullcontext() if is_loading else self.in_master_weights():
            states = [
                optimizer_state.sharded(part, weights, [MASTER], is_loading=is_loading)
                for part in self.optimizer.chained_optimizers
            ]
        return {
            f"{number} {index}": _named(tensors[MASTER])
            for number, state in enumerate(states)
            for index, tensors in state.items()
        }


def _named(entry: ShardedBase) -> ShardedBase:
    """Return the entry of a master weight under the key of its average."""
    return replace(entry, key=PREFIX + optimizer_state.weight_of_master(entry))


def _masters(optimizer: MegatronOptimizer) -> list[Tensor]:
    return [one for part in optimizer.chained_optimizers for one in part.get_parameters()]


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
