"""What a model and its optimizer save in a checkpoint, and how they are filled from one, at any
layout. ``checkpoint/step_folder`` reads what is around the tensors, ``train/saver`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavlm.checkpoint.metadata import read_description
from megavlm.checkpoint.shared_loading import Replicas, SharedLoading
from megavlm.checkpoint.step_folder import SHARDS, Checkpoint
from megavlm.checkpoint.train_state import State
from megavlm.config.freeze_mask import matches_any
from megavlm.config.lora import is_adapter
from megavlm.config.schema import Config, Fp8, Vision
from megavlm.model import nf4_layers
from megavlm.model.positions import POSITIONS_KEY, resize_positions
from megavlm.model.precision import dtype_of
from megavlm.model.vlm import VisionLanguageModel
from megavlm.train import master_weights, objective_state, router_state
from megavlm.train.averages import Averages
from megavlm.train.master_weights import Master, MismatchError
from megavlm.train.optimizer import load_state, oldest
from megavlm.train.optimizer_state import optimizer_parts

_PREFIX = "model."
_POSITIONS = _PREFIX + POSITIONS_KEY
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Experts have an optimizer of their own; the keys of its state say nothing of that.
    "chained_optim_avoid_prefix": True,
}


def _entries(chunks: Sequence[VisionLanguageModel]) -> ShardedStateDict:
    """All that megatron-core saves and loads of this rank's chunks, under names that begin with the
    number of the chunk.

    These names are for this process only: what stands in a file is known by the entry's own key,
    which is the same at every layout.
    """
    return {
        f"{chunk.number} {key}": entry
        for chunk in chunks
        for key, entry in chunk.sharded_state_dict(prefix=_PREFIX).items()
    }


def sharded_weights(chunks: Sequence[VisionLanguageModel]) -> ShardedStateDict:
    """Return the weights of this rank as megatron-core saves and loads them; the same for both
    kinds of layers.
    """
    return {
        name: entry
        for name, entry in _entries(chunks).items()
        if not isinstance(entry, ShardedObject)
    }


def sharded(
    chunks: Sequence[VisionLanguageModel],
    optimizer: MegatronOptimizer,
    fp8: Fp8,
    *,
    is_loading: bool,
    averaged: Averages | None = None,
) -> dict[str, Any]:
    """Return weights, master weights, moments, their averages if there are any, the scales of FP8
    and the state of routers and of the objective, of this rank, as megatron-core saves and loads
    them. Collective.

    Raises:
        MismatchError: what would be saved is wrong: its master weights are not the weights.
    """
    weights = sharded_weights(chunks)
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    parts = optimizer_parts(state, optimizer)
    for part in filter(None, parts):
        # megatron-core 0.19 orders the settings of a group otherwise after a resume, and the file
        # of a resumed run is to equal that of one that was not interrupted.
        groups = part["optimizer"]["param_groups"]
        part["optimizer"]["param_groups"] = [dict(sorted(group.items())) for group in groups]
    if not is_loading:
        found = master_weights.masters(weights, parts)
        master_weights.refuse(master_weights.differences(found, parts, lambda key: None))
    scales = {"scales": _scales(chunks)} if "delayed" in fp8.recipes.values() else {}
    means = {}
    if averaged is not None:
        means["ema"] = averaged.sharded(weights, is_loading=is_loading)
    remembered = router_state.entries(chunks) | objective_state.entries(chunks)
    return {"model": weights, "optimizer": state} | scales | means | remembered


def _scales(chunks: Sequence[VisionLanguageModel]) -> ShardedStateDict:
    """Return the state that delayed FP8 scaling keeps from earlier steps."""
    return {
        name: entry for name, entry in _entries(chunks).items() if isinstance(entry, ShardedObject)
    }


def load_shards(
    checkpoint: Checkpoint, wanted: dict[str, Any], collection: ProcessGroupCollection
) -> dict[str, Any]:
    """Read tensors of a checkpoint. Collective.

    Args:
        checkpoint: where they are; in format 1 keys say ``projector`` for the connector.
        wanted: the tensors, as ``sharded`` names them; their keys may be changed.
        collection: groups of this rank; replicas read together but the state of the optimizer, of
            which each asks for what it owns.
    """
    if checkpoint.state.format == 1:
        dict_list_map_inplace(_name_as_in_format_1, wanted)
    strategy = SharedLoading(Replicas.of(collection))
    # What is asked for is what the chunks have, so it needs no check, for which every rank would
    # hear of the shards of all others.
    return dist_checkpointing.load(
        wanted,
        str(checkpoint.folder / SHARDS),
        sharded_strategy=strategy,
        validate_access_integrity=False,
    )


def _name_as_in_format_1(entry: Any) -> Any:
    if isinstance(entry, ShardedBase):
        entry.key = entry.key.replace(f"{_PREFIX}connector.", f"{_PREFIX}projector.")
    return entry


def load_weights(checkpoint: Checkpoint, chunks: Sequence[VisionLanguageModel]) -> None:
    """Fill this rank's chunks from a checkpoint of their architecture. Collective; call it before
    the optimizer is built, which copies the weights. LoRA adapters that the checkpoint lacks stay
    as they are; position embeddings are resized to the run's tiles.
    """
    before = checkpoint.config.architecture
    wanted = held(checkpoint.state, checkpoint.config, sharded_weights(chunks))
    if not before.lora.rank:
        wanted = {name: entry for name, entry in wanted.items() if not is_adapter(entry.key)}
    wanted = {name: _as_stored(entry, before.vision) for name, entry in wanted.items()}
    loaded = load_shards(checkpoint, {"model": wanted}, chunks[0].groups.collection)["model"]
    for name, entry in wanted.items():
        if entry.key == _POSITIONS:
            classes = int(before.vision.has_class_token)
            grid = chunks[0].architecture.vision.position_grid
            loaded[name] = resize_positions(loaded[name], grid, classes)
    _take(chunks, loaded, partly=checkpoint.state.trained_only)


def _as_stored(entry: Any, vision: Vision) -> Any:
    """Return the entry of position embeddings with the shape that a checkpoint has them in, which
    may be of another tile size; another entry unchanged.
    """
    shape = (1, vision.position_rows, vision.hidden_size)
    if entry.key != _POSITIONS or entry.global_shape == shape:
        return entry
    room = entry.data.new_empty(shape)
    return ShardedTensor.from_rank_offsets(entry.key, room, replica_id=entry.replica_id)


def held(state: State, config: Config, weights: ShardedStateDict) -> ShardedStateDict:
    """Return those of the weights that a checkpoint holds: all, or the trained ones.

    Args:
        state: of the checkpoint.
        config: the run that writes or wrote it.
        weights: of this rank.
    """
    if not state.trained_only:
        return weights
    trainable = config.training.trainable
    return {
        name: entry
        for name, entry in weights.items()
        if matches_any(_masked_as(entry.key), trainable)
    }


def _masked_as(key: str) -> str:
    """Return what a freeze mask calls a weight: a router's bias moves if its weight is trained."""
    key = key.removeprefix(_PREFIX)
    return key.removesuffix("expert_bias") + "weight" if key.endswith(".expert_bias") else key


@torch.no_grad()
def dequantised(
    weights: ShardedStateDict, chunks: Sequence[VisionLanguageModel]
) -> ShardedStateDict:
    """Return what is to be saved, with weights of 4 bits in their own dtype, on the CPU."""
    in_4_bits = nf4_layers.weights(chunks)
    return {
        name: replace(entry, data=in_4_bits[id(entry.data)].whole().cpu())
        if id(entry.data) in in_4_bits
        else entry
        for name, entry in weights.items()
    }


@torch.no_grad()
def load_optimizer(
    checkpoint: Checkpoint,
    chunks: Sequence[VisionLanguageModel],
    optimizer: MegatronOptimizer,
    fp8: Fp8,
    averaged: Averages | None = None,
) -> None:
    """Fill moments, master weights and step count, averages if there are any, the scales of FP8 if
    ``fp8`` is as it was, and the state of routers and of the objective. Collective.

    Raises:
        MismatchError: the checkpoint's master weights are not its weights.
    """
    kept = fp8 if fp8 == checkpoint.config.fp8 else Fp8()
    asked = sharded(chunks, optimizer, kept, is_loading=True, averaged=averaged)
    parts = optimizer_parts(asked["optimizer"], optimizer)
    groups = [part["optimizer"]["param_groups"] for part in parts]
    found = master_weights.masters(asked["model"], parts)
    in_4_bits = nf4_layers.weights(chunks)
    asked["model"] = {
        name: entry
        for name, entry in held(checkpoint.state, checkpoint.config, asked["model"]).items()
        if id(entry.data) not in in_4_bits  # frozen, and loaded before they were
    }
    for remembered in (router_state, objective_state):
        if not remembered.is_kept(checkpoint.config):
            asked.pop(remembered.STATE, None)  # asked for since then
    loaded = load_shards(checkpoint, asked, chunks[0].groups.collection)
    router_state.take(chunks, loaded)
    objective_state.take(chunks, loaded)
    partly = checkpoint.state.trained_only or bool(in_4_bits)
    _take(chunks, loaded["model"] | loaded.get("scales", {}), partly=partly)
    parts = optimizer_parts(loaded["optimizer"], optimizer)
    refuse_mismatch(checkpoint, found, parts)
    # Moments are stored for each parameter. Its group is that of this run, which may be divided
    # otherwise; all groups have seen the same number of updates.
    stored = [part["optimizer"] for part in parts]
    for part in parts:
        part.setdefault("param_state", {})  # of a rank that owns nothing
    # The file has the groups of rank 0, and Transformer Engine's AdamW counts no update of a group
    # without parameters: the count is missing if rank 0 trains nothing.
    counts = [
        group["step"]
        for part in stored
        for group in part["param_groups"]
        if group.get("step") is not None
    ]
    updates = max(counts, default=oldest(optimizer) + checkpoint.state.updates)
    for part, own in zip(stored, groups, strict=True):
        part["param_groups"] = [group | {"step": updates} for group in own]
    if averaged is not None:
        averaged.take(loaded.get("ema", {}))
    # In float32 the master weights are the weights, and the checkpoint's weights may have 16 bits:
    # the master weights come last.
    load_state(optimizer, loaded["optimizer"])


def refuse_mismatch(
    checkpoint: Checkpoint, found: Sequence[Master], parts: Sequence[Mapping[str, Any]]
) -> None:
    """Compare master weights that were read with the chunks' weights, which are the checkpoint's.
    Collective.

    Args:
        checkpoint: the one that they were read from.
        found: the parameters that have master weights.
        parts: of the optimizer's state as it was read.

    Raises:
        MismatchError: they differ on some rank; the message tells how to start from the weights.
    """
    described = read_description(checkpoint.folder / SHARDS / ".metadata").state_dict_metadata
    usual = dtype_of(checkpoint.config)

    def written(key: str) -> torch.dtype:
        entry = described.get(key)
        return entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else usual

    try:
        master_weights.refuse(master_weights.differences(found, parts, written))
    except MismatchError as error:
        raise MismatchError(
            f"the checkpoint {checkpoint.folder}: {error}. megavlm before 0.2 wrote such"
            " checkpoints if there were several gradient buckets: the moments are wrong too, the"
            " weights are right. To start from these with fresh moments: --checkpoint.load"
            f" {checkpoint.folder} --checkpoint.weights_only true, and a new --checkpoint.save"
        ) from None


def _take(
    chunks: Sequence[VisionLanguageModel], loaded: dict[str, Any], *, partly: bool = False
) -> None:
    """Fill the chunks; what their layers remember beside their weights may be missing, and any
    weight if they are filled ``partly``.
    """
    wrong: list[str] = []
    for chunk in chunks:
        start = f"{chunk.number} {_PREFIX}"
        values = {
            name.removeprefix(start): value
            for name, value in loaded.items()
            if name.startswith(start)
        }
        result = chunk.load_state_dict(values, strict=False)
        wrong += [
            *result.unexpected_keys,
            *(
                key
                for key in result.missing_keys
                if not partly and not key.endswith("_extra_state") and not is_adapter(key)
            ),
        ]
    if wrong:
        raise ValueError(f"the checkpoint's weights are not those of the model: {', '.join(wrong)}")
