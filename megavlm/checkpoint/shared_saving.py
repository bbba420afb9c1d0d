"""Lets ranks that are replicas of each other write a share of the weights each; the first of them
wrote all, and the others waited for it.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megavlm.checkpoint.shared_loading import Replicas


def share(weights: ShardedStateDict, replicas: Replicas) -> ShardedStateDict:
    """Return the weights of this rank with an owner for each, who writes it, among its replicas.

    Args:
        weights: by name, as megatron-core saves them: the last number of the id of a replica says
            which it is, and the one with 0 writes.
        replicas: of this rank; all of them have the same weights.
    """
    owners = replicas.divide(list(weights.values()))
    return {
        name: replace(
            entry, replica_id=(*entry.replica_id[:2], (group.rank() - owner) % group.size())
        )
        for (name, entry), (owner, group) in zip(weights.items(), owners, strict=True)
    }
