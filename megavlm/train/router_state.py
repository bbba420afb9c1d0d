"""What routers remember of the step before, in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

from megavlm.config.schema import Config, Training
from megavlm.config.unfreezing import frozen_steps
from megavlm.model.vlm import VisionLanguageModel

STATE = "routers"


def is_kept(config: Config) -> bool:
    """Return whether checkpoints of a run hold a state of routers."""
    return bool(config.architecture.language.num_experts) and (
        config.experts.balance_over == "global_batch"
    )


def let_wait(chunks: Sequence[VisionLanguageModel], training: Training, step: int) -> None:
    """Leave out the losses of routers that ``--training.frozen_until`` still holds in the step
    after ``step``: what is before them would be trained by these.
    """
    if not training.frozen_until:
        return
    for chunk in chunks:
        for router in chunk.routers:
            key = f"language.decoder.layers.{router.layer_number - 1}.mlp.router.weight"
            router.is_waiting = step < frozen_steps(key, training)


def entries(chunks: Sequence[VisionLanguageModel]) -> dict[str, ShardedStateDict]:
    """Return the state of this rank's routers as megatron-core saves and loads it, under the name
    ``STATE``; nothing if they have none. Keys are those of layers, the same at every layout.
    """
    found = {
        str(router.layer_number): ShardedTensor.from_rank_offsets(
            f"{STATE}.{router.layer_number - 1}.shares",
            router.shares,
            replica_id=(0, 0, router.tp_dp_cp_group.rank()),
        )
        for chunk in chunks
        for router in chunk.routers
        if router.balances_steps
    }
    return {STATE: found} if found else {}


def take(chunks: Sequence[VisionLanguageModel], loaded: Mapping[str, Any]) -> None:
    """Fill this rank's routers from what was read of ``entries``; they stay as they are if it holds
    nothing of them.
    """
    for chunk in chunks:
        for router in chunk.routers:
            if str(router.layer_number) in loaded.get(STATE, {}):
                router.shares.copy_(loaded[STATE][str(router.layer_number)])
