"""Lets ranks that are replicas of each other write a share of the weights each; the first of them
wrote all, and the others waited for it.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from megavlm.checkpoint.shared_loading import Replicas, is_of_experts, spread


def share(weights: ShardedStateDict, replicas: Replicas) -> ShardedStateDict:
    """Return the weights of this rank with an owner for each, who writes it, among its replicas.

    Args:
        weights: by name, as megatron-core saves them: the last number of the id of a replica says
            which it is, and the one with 0 writes.
        replicas: of this rank; all of them have the same weights.
    """
    shared = {}
    for group, of_experts in ((replicas.dense, False), (replicas.experts, True)):
        entries = {
            name: entry for name, entry in weights.items() if is_of_experts(entry.key) == of_experts
        }
        sizes = [entry.data.nbytes for entry in entries.values()]
        for (name, entry), owner in zip(entries.items(), spread(sizes, group.size()), strict=True):
            number = (group.rank() - owner) % group.size()
            shared[name] = replace(entry, replica_id=(*entry.replica_id[:2], number))
    return {name: shared[name] for name in weights}
