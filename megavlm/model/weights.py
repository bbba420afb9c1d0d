"""The weights of a chunk under the names that checkpoints use, whatever the layout and the kernels
of the layers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from megavlm.checkpoint.rank_errors import raised_on_all
from megavlm.checkpoint.shared_loading import Replicas, send
from megavlm.config.lora import MAGNITUDE
from megavlm.config.schema import Architecture, Config
from megavlm.model.vision_attention import unpadded_shape
from megavlm.model.vlm import VisionLanguageModel


class Sliceable(Protocol):
    """A whole tensor, of which parts can be taken; it need not be in memory."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor:
        """Take a part."""


FullTensor = Callable[[str, tuple[int, ...]], Sliceable]


def named_weights(model: VisionLanguageModel) -> dict[str, nn.Parameter]:
    """Parameters of this chunk by checkpoint key, such as
    ``vision.encoder.layers.3.mlp.linear_fc1.weight``.
    """
    sharded = model.sharded_state_dict().values()
    return {
        entry.key: entry.data
        for entry in sharded
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        and isinstance(entry.data, nn.Parameter)  # not the bias of a router
    }


def _shards(model: VisionLanguageModel) -> list[ShardedTensor]:
    found: list[ShardedTensor] = []

    def collect(entry):
        if isinstance(entry, ShardedTensorFactory):
            dict_list_map_inplace(collect, [entry.build()])
        elif isinstance(entry, ShardedTensor):
            found.append(entry)
        return entry

    dict_list_map_inplace(collect, dict(model.sharded_state_dict()))
    return found


def weight_sizes(model: VisionLanguageModel) -> dict[str, int]:
    """Numbers in each whole tensor of which this chunk holds a part, by checkpoint key, without
    rows and heads that only pad.
    """
    arch = model.architecture
    return {
        shard.key: math.prod(_unpadded(arch, shard.key, tuple(shard.global_shape)))
        for shard in _shards(model)
    }


def _unpadded(arch: Architecture, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a whole tensor as it is without padding for the layout."""
    if key.startswith("vision."):
        return unpadded_shape(arch.vision, key, shape)
    if key.endswith(("word_embeddings.weight", "output_layer.weight")):
        return (arch.table_rows, *shape[1:])
    return shape


@torch.no_grad()
def fill(
    chunks: Sequence[VisionLanguageModel],
    full_tensor: FullTensor,
    wanted: Callable[[str], bool] = lambda key: True,
) -> None:
    """Fill the weights of these chunks, each with its part of the whole tensor. Collective: of
    ranks that are replicas of each other each takes a share of the parts, and sends it to the
    others.

    Args:
        chunks: this rank's.
        full_tensor: takes a checkpoint key and the shape of the whole tensor, and answers with that
            tensor. It may be shorter (a vocabulary or heads without padding); what is missing
            becomes zero. Only these chunks' parts are taken of it.
        wanted: whether the weight of a key is filled.

    Raises:
        RankError: a rank cannot read a tensor; every rank raises it.
    """
    shards = [one for chunk in chunks for one in _shards(chunk) if wanted(one.key)]
    owners = Replicas.of(chunks[0].groups.collection).divide(shards)
    with raised_on_all():
        for shard, (owner, group) in zip(shards, owners, strict=True):
            if owner != group.rank():
                continue
            part = full_tensor(shard.key, tuple(shard.global_shape))[shard.global_slice()]
            shard.data.zero_()
            shard.data[tuple(slice(0, size) for size in part.shape)].copy_(part)
    for shard, (owner, group) in zip(shards, owners, strict=True):
        send(shard.data, owner, group)


def fresh_tensor(config: Config) -> FullTensor:
    """Fresh weights, drawn from the seed and the weight's name, so that they are the same at every
    layout.

    Matrices are normal with standard deviation sqrt(2 / (5 D)) (Nguyen and Salazar, arXiv
    1910.05895), those that end a residual branch divided by the root of twice the layers (Radford
    et al., GPT-2), latents with 1; adapters start as PEFT's, with B at zero; norms start at one (at
    zero if 1 is added to them), biases and sinks at zero, layer scale and gates as configured.
    """
    arch = config.architecture
    seed = config.training.seed
    parts = {
        "vision": (arch.vision.hidden_size, arch.vision.num_layers),
        "connector": (arch.connector_sizes.feature_size, 1),
        "language": (arch.language.hidden_size, arch.language.num_layers),
        "objective": (arch.needs.head_input(arch), 1),
    }

    constants = arch.needs.constants(arch)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        if key in constants:
            return torch.full(shape, constants[key])
        shape = _unpadded(arch, key, shape)
        if key.endswith((".lora.b", MAGNITUDE)):  # a magnitude begins as the norm of its row
            return torch.zeros(shape)
        if key.endswith("_gate"):
            return torch.full(shape, arch.cross_attention.gate_start)
        if key.endswith("_scale"):
            return torch.full(shape, arch.vision.layer_scale)
        if key.endswith(("norm.weight", "layer_norm_weight", "qk_norm.query", "qk_norm.key")):
            is_zero = key.startswith("language.") and arch.language.zero_centered_norm
            return torch.zeros(shape) if is_zero else torch.ones(shape)
        if key.endswith(("bias", "softmax_offset")):
            return torch.zeros(shape)
        width, layers = parts[key.split(".")[0]]
        if key.endswith(".lora.a"):
            # PEFT's start: kaiming_uniform_ with a = sqrt(5).
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
            return (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
        std = {
            "connector.latents": 1.0,
            "connector.newline": arch.language.hidden_size**-0.5,  # LLaVA-NeXT's
        }.get(key, (2 / (5 * width)) ** 0.5)
        if key.endswith(("linear_proj.weight", "linear_fc2.weight")) and layers > 1:
            std /= (2 * layers) ** 0.5
        # The connector keeps the name that it was drawn by first, so that a seed keeps its meaning.
        drawn_as = key.replace("connector.", "projector.", 1) if key.startswith("conn") else key
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {drawn_as}".encode()))
        return torch.normal(0.0, std, shape, generator=generator)

    return draw
