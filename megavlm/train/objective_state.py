"""What an objective remembers of earlier steps, in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor

from megavlm.config.schema import Config
from megavlm.model.vlm import VisionLanguageModel

STATE = "objective"


def is_kept(config: Config) -> bool:
    """Return whether checkpoints of a run hold a state of the objective."""
    return config.architecture.needs.is_of_preferences


def entries(chunks: Sequence[VisionLanguageModel]) -> dict[str, ShardedStateDict]:
    """Return the state of this rank's objective as megatron-core saves and loads it, under the name
    ``STATE``; nothing if it has none. It is the same at every layout.
    """
    found = {
        name: ShardedTensor.from_rank_offsets(
            f"{STATE}.{name}",
            tensor,
            replica_id=(0, chunk.groups.tensor_rank, chunk.groups.collection.dp_cp.rank()),
        )
        for chunk in chunks
        for name, tensor in chunk.objective.state().items()
    }
    return {STATE: found} if found else {}


def take(chunks: Sequence[VisionLanguageModel], loaded: Mapping[str, Any]) -> None:
    """Fill this rank's objective from what was read of ``entries``; it stays as it is if that holds
    nothing of it.
    """
    for chunk in chunks:
        for name, tensor in chunk.objective.state().items():
            if name in loaded.get(STATE, {}):
                tensor.copy_(loaded[STATE][name])
