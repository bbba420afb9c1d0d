"""What grows with the number of ranks: what they tell each other at a save, and what they read at a
load. A few ranks show it, since counts are compared.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megavlm.config.schema import Parallel
from tests.ranks.pool import Pool

SHARDS = 40


def _entries(rank: int, world: int) -> dict[str, Any]:
    """Return shards that all ranks hold, one of experts that every second one holds, and one that
    is cut among the ranks.
    """
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    made = ShardedTensor.from_rank_offsets
    found = {
        f"dense {number}": made(
            f"layers.{number}.weight", torch.full((3, number + 1), float(number)), replica_id=rank
        )
        for number in range(SHARDS)
    }
    half = torch.full((2, 5), float(rank % 2), dtype=torch.bfloat16)
    found["expert"] = made("x.mlp.experts.w", half, (0, rank % 2, 2), replica_id=rank // 2)
    found["cut"] = made("cut", torch.full((1, 4), float(rank)), (0, rank, world))
    return found


def _save_and_load(folder: Path) -> dict[str, Any]:
    """Save shards and load them again; return how many bytes each object has that this rank tells
    others, and the keys that it reads: of all shards, and of those that its replicas need too.
    """
    import torch.distributed as dist

    from megavlm.checkpoint import whole_shards
    from megavlm.checkpoint.async_writer import Writing
    from megavlm.parallel import cpu_backend

    cpu_backend.install()
    rank = dist.get_rank()
    world = dist.get_world_size()
    told: list[int] = []
    gather = dist.gather_object

    def counted(value: Any, *rest: Any, **options: Any) -> None:
        told.append(len(pickle.dumps(value)))
        gather(value, *rest, **options)

    saved = _entries(rank, world)
    with (
        mock.patch.object(dist, "gather_object", counted),
        mock.patch.object(dist, "all_gather_object", side_effect=AssertionError("tells all ranks")),
    ):
        whole_shards.check(saved)
    writing = Writing(saved, folder, beside=False)
    assert writing.wait().error == ""
    writing.describe()
    halves = [dist.new_group(list(range(half, world, 2))) for half in (0, 1)]
    common = {name: entry for name, entry in _entries(rank, world).items() if name != "cut"}
    read_all, read = (
        _load(folder, wanted, halves[rank % 2]) for wanted in (_entries(rank, world), common)
    )
    return {"told": told, "read_all": read_all, "read": read}


def _load(folder: Path, wanted: dict[str, Any], same_experts: Any) -> list[str]:
    """Load shards, check their values, and return the keys that this rank reads."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    from megavlm.checkpoint.shared_loading import Replicas, SharedLoading

    read: list[str] = []
    load = TorchDistLoadShardedStrategy.load

    def counted(self: Any, entries: dict, *rest: Any) -> dict:
        read.extend(entry.key for entry in entries.values())
        return load(self, entries, *rest)

    right = {name: entry.data.clone() for name, entry in wanted.items()}
    for entry in wanted.values():
        entry.data.fill_(-1)
    replicas = Replicas(dense=dist.group.WORLD, experts=same_experts)
    with mock.patch.object(TorchDistLoadShardedStrategy, "load", counted):
        loaded = dist_checkpointing.load(
            wanted,
            str(folder),
            sharded_strategy=SharedLoading(replicas),
            validate_access_integrity=False,
        )
    assert all(torch.equal(loaded[name], value) for name, value in right.items())
    return read


def _check(fault: str) -> str:
    """Return what the check of shards says, with a fault on one of them."""
    import dataclasses

    import torch.distributed as dist

    from megavlm.checkpoint import whole_shards

    entries = _entries(dist.get_rank(), dist.get_world_size())
    writer = {"twice": 0, "nobody": 1, "none": dist.get_rank()}[fault]
    entries["dense 3"] = dataclasses.replace(entries["dense 3"], replica_id=writer)
    try:
        whole_shards.check(entries)
    except whole_shards.ShardError as error:
        return str(error)
    return ""


def _flushed(folder: Path) -> tuple[set[str], set[str]]:
    """Save shards; return the files of which this rank tells the checksum, and those of which it,
    or a process that it starts, waits until they are on the disk.
    """
    import os

    import torch.distributed as dist

    from megavlm.checkpoint.async_writer import Writing
    from megavlm.parallel import cpu_backend

    cpu_backend.install()
    rank = dist.get_rank()
    noted = folder / f"flushed.{rank}"
    fsync = os.fsync

    def watched(file: int) -> None:
        fsync(file)
        with noted.open("a") as names:
            names.write(Path(f"/proc/self/fd/{file}").readlink().name + "\n")

    (folder / "shards").mkdir(exist_ok=True)
    dist.barrier()
    with mock.patch.object(os, "fsync", watched):
        writing = Writing(_entries(rank, dist.get_world_size()), folder / "shards", beside=False)
        sums = writing.wait().sums
        told = set(noted.read_text().split())
        writing.describe()
    return {Path(name).name for name in sums}, told


def test_ranks_flush_the_shards_that_they_write(ranks: Pool, tmp_path: Path) -> None:
    """The first one does not when it names the checkpoint."""
    for written, flushed in ranks.run(_flushed, 2, tmp_path):
        assert written and written <= flushed


def test_a_save_tells_and_a_load_reads_the_same_however_many_replicas_there_are(
    ranks: Pool, tmp_path: Path
) -> None:
    found = {}
    for world in (2, 4):
        (tmp_path / str(world)).mkdir()
        found[world] = ranks.run(_save_and_load, world, tmp_path / str(world))
        read = [key for rank in found[world] for key in rank["read"]]
        # Who needs other shards than the others of its group reads all but experts itself.
        assert all(len(rank["read_all"]) >= SHARDS + 1 for rank in found[world])
        # Each half of the experts is read by one of its ranks.
        assert len(read) == SHARDS + 2 and len(set(read)) == SHARDS + 1
        assert max(len(rank["read"]) for rank in found[world]) <= len(read) / world + 1
    # The first rank's shards are all but those that are cut; of others only these are told.
    few, many = (max(found[world][-1]["told"]) for world in (2, 4))
    assert many <= few < max(found[2][0]["told"]) / 2


def keys_told_with_owners() -> int:
    """Check shards of which each rank owns some beside those that all hold; return how many keys
    this rank tells the first one.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megavlm.checkpoint import whole_shards

    rank = dist.get_rank()
    world = dist.get_world_size()
    common = {name: one for name, one in _entries(rank, world).items() if "dense" in name}
    owned = {
        number: ShardedTensor.from_rank_offsets(f"optimizer.state.{number}", torch.zeros(4))
        for number in range(rank, SHARDS, world)
    }
    told: list[int] = []
    gather = whole_shards._on_first

    def noted(value: Any) -> list[Any]:
        told.append(len(value) if isinstance(value, list) else 0)
        return gather(value)

    with mock.patch.object(whole_shards, "_on_first", noted):
        whole_shards.check({"model": common, "optimizer": owned})
    return sum(told)


def test_owners_of_state_tell_no_keys_that_replicas_have_in_common(ranks: Pool) -> None:
    assert ranks.run(keys_told_with_owners, 4) == [SHARDS, 0, 0, 0]


@pytest.mark.parametrize(
    ("fault", "words"), [("twice", "whole tensors"), ("nobody", "no rank would write layers.3.")]
)
def test_shards_that_make_no_whole_tensor_are_refused_on_every_rank(
    ranks: Pool, fault: str, words: str
) -> None:
    assert ranks.run(_check, 2, "none") == ["", ""]
    assert all(words in told for told in ranks.run(_check, 2, fault))


def asked_backends() -> list[str | None]:
    """Return the backends that process groups are asked for; None: that of the whole job."""
    import torch.distributed as dist

    from megavlm.parallel import backend, process_groups

    asked: list[str | None] = []
    new_group = dist.new_group

    def noted(*rest: Any, **options: Any) -> Any:
        asked.append(options.get("backend"))
        return new_group(*rest, **options)

    backend.start(5)
    with mock.patch.object(dist, "new_group", noted):
        process_groups.create(Parallel(), 0)
    return asked


def test_no_rank_has_connections_of_gloo_beside_those_of_training(ranks: Pool) -> None:
    # On GPUs each such group would connect every rank with every other one, over the network.
    for asked in ranks.run(asked_backends, 2):
        assert len(asked) > 5 and "gloo" not in asked
