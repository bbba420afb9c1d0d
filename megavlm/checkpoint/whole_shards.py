"""Whether the shards of all ranks make whole tensors, before they are written.

megatron-core's own check (``validation.determine_global_metadata``) tells every rank of the shards
of all others: of 1,024 data-parallel ranks with the 2,420 shards of an 8B model each 350 MB, on
every GPU, at every save. The first rank alone looks at them. So it alone is told, and only what is
written: of shards that many ranks hold, one.
"""

from __future__ import annotations

import hashlib
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedStateDict,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity

from megavlm.checkpoint.shared_loading import OWNED


class ShardError(RuntimeError):
    """Shards that do not make whole tensors; every rank raises it."""


def check(tensors: ShardedStateDict) -> None:
    """Check that each shard is written by one rank, and that the shards of a tensor are all of it.
    Collective.

    Args:
        tensors: what this rank has to save; factories of shards become shards.

    Raises:
        ShardError: on every rank, what is wrong.
    """
    apply_factories(tensors)
    written = [one.without_data() for one in _entries(tensors) if is_main_replica(one.replica_id)]
    told = _on_first(zlib.compress(pickle.dumps(written), 1))
    shards = [pickle.loads(zlib.decompress(each)) for each in told]
    missing = _all_keys(tensors) - {one.key for of_rank in shards for one in of_rank}
    problem = _problem(shards, missing) if dist.get_rank() == 0 else ""
    verdict = [problem]
    dist.broadcast_object_list(verdict)
    if verdict[0]:
        raise ShardError(verdict[0])


def _problem(shards: Sequence[Sequence[ShardedBase]], missing: set[str]) -> str:
    """Return what is wrong with what the ranks write; empty if nothing is."""
    if missing:
        return f"no rank would write {', '.join(sorted(missing))}"
    try:
        validate_sharding_integrity(shards)
    except (CheckpointingException, AssertionError) as error:
        return f"the ranks' shards do not make whole tensors: {error}"
    return ""


def _all_keys(tensors: ShardedStateDict) -> set[str]:
    """Return the keys of all ranks' entries on the first rank, nothing on others. Replicas have the
    same ones, so the first of them tells them for all; but for those that one of them has for all,
    which are told if another rank is to write them. Collective.
    """
    common = {name: value for name, value in tensors.items() if name not in OWNED}
    keys = sorted({one.key for one in _entries(common)})
    digests = _on_first(hashlib.sha256("\n".join(keys).encode()).digest())
    tellers = [[digests.index(digest) for digest in dict.fromkeys(digests)]]
    dist.broadcast_object_list(tellers)
    owned = {name: value for name, value in tensors.items() if name in OWNED}
    others = [one.key for one in _entries(owned) if not is_main_replica(one.replica_id)]
    told = _on_first((keys if dist.get_rank() in tellers[0] else []) + others)
    return set().union(*told)


def _entries(tensors: ShardedStateDict) -> list[ShardedBase]:
    return [one for one in nested_values(tensors) if isinstance(one, ShardedBase)]


def _on_first(value: Any) -> list[Any]:
    """Return the values of all ranks on the first rank, nothing on others. Collective."""
    is_first = dist.get_rank() == 0
    found = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(value, found)
    return found or []
