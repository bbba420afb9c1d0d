"""AdamW's moments across a change of stage: those of weights that both stages train may be kept,
all others start fresh.

A fresh moment is an average over few gradients, and AdamW corrects for that by the number of its
updates. megatron-core counts updates once for all weights, so weights whose moments are younger
than the oldest stand in a parameter group of their own, whose rates (``train/optimizer.set_rates``)
make up for the difference, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer

from megavlm.checkpoint.step_folder import Checkpoint
from megavlm.checkpoint.train_state import History
from megavlm.config.freeze_mask import matches
from megavlm.config.lora import is_adapter
from megavlm.config.schema import Fp8
from megavlm.model.positions import POSITIONS_KEY
from megavlm.model.vlm import VisionLanguageModel
from megavlm.model.weights import named_weights
from megavlm.train import checkpoint, master_weights
from megavlm.train.optimizer import load_state, oldest
from megavlm.train.optimizer_state import MASTER, join_parts, optimizer_parts, weight_of_master


def age(key: str, history: History) -> int:
    """Return the number of updates that the moments of ``key`` saw in earlier stages, counted back
    to the last stage that did not train it.
    """
    updates = 0
    for steps, trainable in reversed(history):
        if not _is_trained(key, trainable):
            break
        updates += steps
    return updates


def ages(chunks: Sequence[VisionLanguageModel], history: History) -> dict[int, int]:
    """Age of every weight of this rank, by ``id`` of the parameter; nothing where no stage came
    before.
    """
    named = [named for chunk in chunks for named in named_weights(chunk).items()] if history else []
    return {id(parameter): age(key, history) for key, parameter in named}


def _is_trained(key: str, trainable: Sequence[str]) -> bool:
    # "language" means no adapters: a stage names those by a pattern of their own.
    return any(
        matches(key, pattern) and (not is_adapter(key) or "lora" in pattern)
        for pattern in trainable
    )


@torch.no_grad()
def keep(
    source: Checkpoint,
    chunks: Sequence[VisionLanguageModel],
    optimizer: MegatronOptimizer,
) -> None:
    """Fill main weights and moments of what the checkpoint's stage trained too. Collective.

    Args:
        source: last checkpoint of the stage before.
        chunks: this rank's, with the checkpoint's weights.
        optimizer: their optimizer, just built.
    """
    everything = checkpoint.sharded(chunks, optimizer, Fp8(), is_loading=True)
    before = source.config.architecture.vision
    resizes = before.grid != chunks[0].architecture.vision.grid
    weights = {f"model.{key}": one for chunk in chunks for key, one in named_weights(chunk).items()}
    parts = optimizer_parts(everything["optimizer"], optimizer)
    wanted: list[dict[str, dict]] = []
    for part in parts:
        kept = {}
        for index, entries in part["param_state"].items():
            weight = weight_of_master(entries[MASTER])
            key = weight.removeprefix("model.")
            # Positions of another tile size have other shapes.
            is_resized = key == POSITIONS_KEY and resizes
            if _is_trained(key, source.config.training.trainable) and not is_resized:
                kept[index] = entries
                continue
            fresh = {name: torch.zeros_like(entry.data) for name, entry in entries.items()}
            fresh[MASTER] = weights[weight].detach().float().reshape(fresh[MASTER].shape)
            part["param_state"][index] = fresh
        wanted.append({"param_state": kept})
    found = master_weights.masters(everything["model"], wanted)
    collection = chunks[0].groups.collection
    loaded = checkpoint.load_shards(source, {"optimizer": join_parts(wanted)}, collection)
    read = optimizer_parts(loaded["optimizer"], optimizer)
    checkpoint.refuse_mismatch(source, found, read)
    for part, of_part in zip(parts, read, strict=True):
        # Parameter groups are those of this run; the checkpoint's are divided otherwise.
        for group in part["optimizer"]["param_groups"]:
            group["step"] = oldest(optimizer)
        part["param_state"] |= of_part.get("param_state", {})
    load_state(optimizer, join_parts(parts))
