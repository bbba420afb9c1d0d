"""Activation memory: what the forward pass keeps for the backward pass, in elements per token.

Counted tensor by tensor as Korthikanti et al. do (arXiv 2205.05198, section 4), for attention that
keeps no probabilities and without dropout. A frozen layer behind a trained one keeps less: what
only the gradients of weights would read is not kept. A layer with nothing trained before it keeps
nothing.

Shape letters: D hidden size, M hidden size of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megavlm.config.cross_attention import is_cross_attention, memory_rows
from megavlm.config.freeze_mask import matches_any, trains
from megavlm.config.schema import Architecture, Config, Language, Parallel, Vision
from megavlm.planner.adapters import kept_by_adapters, stacked_factors
from megavlm.planner.flops import pieces
from megavlm.planner.layout import Chunk
from megavlm.planner.parameters import parameters_on_rank
from megavlm.planner.partition import PackSize, layer_costs, layer_of
from megavlm.planner.rank_load import RankLoad

NUMBER_BYTES = {"bfloat16": 2, "float32": 4}
_ANY_PACK = PackSize(tokens=1.0, squared_lengths=1.0, tiles=1.0, squared_tiles=1.0)


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Bytes of activations of one model chunk on one rank.

    Args:
        per_microbatch: kept for every microbatch in flight.
        once: needed while one microbatch is computed: a layer that is recomputed, or keeps nothing;
            logits.
    """

    per_microbatch: float
    once: float


def has_backward(config: Config) -> tuple[bool, ...]:
    """Return for each layer of the whole model whether anything in it has a gradient."""
    return _has_backward(config.architecture, config.training.trainable)


@lru_cache(maxsize=64)
def _has_backward(arch: Architecture, trainable: tuple[str, ...]) -> tuple[bool, ...]:
    forward = layer_costs(arch, (), _ANY_PACK)
    whole = layer_costs(arch, trainable, _ANY_PACK)
    return tuple(cost > once for cost, once in zip(whole, forward, strict=True))


@lru_cache(maxsize=64)
def _keep_inputs(arch: Architecture, trainable: tuple[str, ...]) -> tuple[tuple[bool, bool], ...]:
    """Return for each layer of the whole model whether its matrices, and those of a block of
    cross-attention in front of it, need their inputs in the backward pass: not if they are frozen,
    though the gradient passes through them.
    """
    vision = arch.vision.num_layers
    found = [[False, False] for _ in range(vision + arch.language.num_layers)]
    for piece in pieces(arch):
        if piece.layer is not None and piece.is_matrix and matches_any(piece.key, trainable):
            found[layer_of(piece, vision, len(found))][is_cross_attention(piece.key)] = True
    return tuple((own, block) for own, block in found)


def activation_memory(config: Config, chunk: Chunk, load: RankLoad) -> ActivationMemory:
    """Estimate the activation memory of a chunk on one rank."""
    arch = config.architecture
    parallel = config.parallel
    size = NUMBER_BYTES[config.training.precision]
    backward = has_backward(config)
    rows = {"vision": load.tiles * arch.vision.layer_tokens, "language": load.tokens}
    keep_inputs = _keep_inputs(arch, config.training.trainable)
    numbers = chunk.layer_numbers(arch.vision.num_layers)
    layers = {one: _layers(config, one) for one in {keep_inputs[layer][0] for layer in numbers}}
    width = {"vision": arch.vision.hidden_size, "language": arch.language.hidden_size}
    per_microbatch = 0.0
    once = 0.0
    for layer in numbers:
        part = "vision" if layer < arch.vision.num_layers else "language"
        recompute = parallel.recompute_of(part) if backward[layer] else "nothing"
        own = layers[keep_inputs[layer][0]][part]
        (whole, inside) = (
            size * (elements + added)
            for elements, added in zip(own, kept_by_adapters(arch, parallel, layer), strict=True)
        )
        kept, transient = _kept((whole, inside), size * width[part], recompute)
        (whole, inside) = (size * number for number in stacked_factors(arch, parallel, layer))
        of_factors = _kept((whole, inside), 0, recompute)
        per_microbatch += kept * rows[part] + of_factors[0]
        once = max(once, transient * rows[part] + of_factors[1])
    of_blocks = _blocks(config, chunk, load)
    per_microbatch += of_blocks.per_microbatch + size * _around_layers(config, chunk, load)
    once = max(once, of_blocks.once)
    # One weight of 4 bits at a time is whole.
    once += size * parameters_on_rank(config, chunk).largest_in_nf4
    if chunk.has_head and arch.needs.has_vocabulary_head:
        words = arch.language.vocab_size / parallel.tensor_model_parallel_size
        block = config.loss.vocabulary_block
        once += load.head_tokens * min(words, block or words) * _logit_bytes(config)
        if config.loss.is_by_block:  # the gradient of the hidden states, in float32
            once += load.head_tokens * arch.language.hidden_size * 4
    return ActivationMemory(per_microbatch=per_microbatch, once=once)


def _layers(config: Config, is_trained: bool) -> dict[str, tuple[float, float]]:
    """Count for each part what one of its layers keeps per token, as ``_vision_layer`` does."""
    arch = config.architecture
    parallel = config.parallel
    found = {
        "vision": _vision_layer(arch.vision, parallel, is_trained),
        "language": _language_layer(arch.language, parallel, is_trained),
    }
    for part in set(found) & set(config.fp8.recipes):
        # Adapters read the same inputs in 16 bits, and their linear layers are frozen.
        if is_trained and not arch.lora.rank:
            (whole, inside) = zip(found[part], _saved_by_fp8(config, part), strict=True)
            found[part] = (whole[0] - whole[1], inside[0] - inside[1])
    return found


def _saved_by_fp8(config: Config, part: str) -> tuple[float, float]:
    """Count what FP8 keeps less of a trained layer per token, and less of it inside the MLP, in
    elements of 16 bits: Transformer Engine keeps the inputs of linear layers in 8 bits alone, but
    for the output of attention, which attention needs as it is.
    """
    parallel = config.parallel
    if part == "vision":
        model: Vision | Language = config.architecture.vision
        inner = model.ffn_hidden_size
        attended = model.hidden_size
        tensor = parallel.vision_tensor_size
        split = 1
    else:
        model = config.architecture.language
        inner = model.ffn_hidden_size
        attended = model.num_attention_heads * model.head_size
        tensor = parallel.tensor_model_parallel_size
        split = tensor if parallel.sequence_parallel else 1
    in_16_bits = config.fp8.first_bf16_layers + config.fp8.last_bf16_layers
    share = max(model.num_layers - in_16_bits, 0) / model.num_layers / 2
    inputs = 2 * model.hidden_size / split
    inside = share * inner / tensor
    if part == "language" and model.num_experts:  # read copies of their tokens
        inputs = model.hidden_size / split
        read = parallel.expert_tensor_parallel_size * model.hidden_size
        read += model.expert_ffn_hidden_size
        of_shared = model.shared_expert_ffn_hidden_size
        inside = share * (model.experts_per_token * read + of_shared) / tensor
    return inside + share * (inputs - attended / tensor), inside


def _logit_bytes(config: Config) -> int:
    """Count the bytes of a logit while the loss is computed.

    Both losses write over what they get: Transformer Engine's the logits, megatron-core's own
    their copy in 32 bits. A loss by block has logits, that copy, and the gradient in 16 bits. A
    soft cap keeps what its slope is computed from.
    """
    has_cap = config.architecture.language.final_softcap > 0
    is_float32 = config.training.precision == "float32"
    if config.loss.is_by_block:
        # The slope of a soft cap, in float32.
        return (4 if is_float32 else 8) + 4 * has_cap
    if is_float32:
        return 4 + 4 * has_cap
    return (6 if config.training.kernels == "local" else 2) + 2 * has_cap


def _blocks(config: Config, chunk: Chunk, load: RankLoad) -> ActivationMemory:
    """Estimate the activation memory of the blocks of cross-attention of a chunk."""
    arch = config.architecture
    backward = has_backward(config)
    keep_inputs = _keep_inputs(arch, config.training.trainable)
    is_kept = config.parallel.recompute_of("language") != "full"
    size = NUMBER_BYTES[config.training.precision]
    per_microbatch = 0.0
    once = 0.0
    for layer in chunk.language_layers:
        if arch.cross_attention.stands_before(layer):
            number = arch.vision.num_layers + layer
            found = size * _block(config, load, keep_inputs[number][1])
            per_microbatch += found if backward[number] and is_kept else 0.0
            once = max(once, found)
    return ActivationMemory(per_microbatch=per_microbatch, once=once)


def _block(config: Config, load: RankLoad, is_trained: bool) -> float:
    """Count the elements of the block of cross-attention in front of a language layer: for each
    token inputs and results of both norms and of both gates, queries before and after their norm,
    the result of the attention before and after its rows are spread, and the MLP; for each tile
    keys and values.
    """
    arch = config.architecture
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    language = arch.language
    heads = language.num_attention_heads * language.head_size
    width = (6 if is_trained else 4) * language.hidden_size
    inputs = 2 if language.is_gated else 1
    inner = (inputs + 1 if is_trained else inputs) * language.ffn_hidden_size
    of_token = width / (tensor if parallel.sequence_parallel else 1) + (4 * heads + inner) / tensor
    of_tile = 3 * arch.features_per_tile * heads / tensor
    return load.tokens * of_token + load.tiles * parallel.tile_ranks * of_tile


def _around_layers(config: Config, chunk: Chunk, load: RankLoad) -> float:
    """Count the elements kept per microbatch outside the layers: by the final norms and the
    connector, and the output that is sent to the next pipeline stage.
    """
    arch = config.architecture
    parallel = config.parallel
    found = 0.0
    tokens = load.tokens / (
        parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    )
    mask = config.training.trainable
    if chunk.has_connector and any(trains(part, mask) for part in ("vision", "connector")):
        found += load.tiles * arch.connector_sizes.kept(parallel.vision_tensor_size)
    if chunk.language_layers:  # the levels of DeepStack, spread over the tokens
        levels = arch.vision.levels_from(chunk.language_layers.start)
        found += levels * tokens * arch.language.hidden_size
    ends_vision = arch.vision.num_layers - 1 in chunk.vision_layers
    if arch.vision.final_norm and ends_vision and trains("vision", mask):
        found += load.tiles * arch.vision.layer_tokens * arch.vision.hidden_size
    if chunk.has_head and not arch.language.exists:
        pool = arch.image_text.pool_packs or config.training.global_batch_size
        pooled = pool * parallel.tile_ranks * arch.needs.pooled(arch)
        return found + load.tiles * (arch.needs.kept(arch) + pooled)
    if chunk.has_head:
        # Inputs of the final norm and of the head, which are whole on every tensor-parallel rank.
        return found + (tokens + load.head_tokens) * arch.language.hidden_size
    return found + boundary_elements(config, chunk, load)


def boundary_elements(config: Config, chunk: Chunk, load: RankLoad) -> float:
    """Count the elements of a microbatch that a chunk sends to the next one."""
    arch = config.architecture
    parallel = config.parallel
    vision = arch.vision
    if not chunk.language_layers:
        outputs = 1 + vision.outputs_before(chunk.vision_layers.stop)
        return outputs * load.tiles * vision.layer_tokens * vision.hidden_size
    width = arch.language.hidden_size
    rows = load.tokens * (1 + vision.levels_from(chunk.language_layers.stop))
    rows /= parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    rows += memory_rows(arch, load.tiles * parallel.tile_ranks)
    return width * (rows + math.ceil(load.tiles * arch.needs.riding(arch) / width))


def _kept(layer: tuple[float, float], entering: int, recompute: str) -> tuple[float, float]:
    """Return the bytes that a layer keeps per token, and those that it needs while it runs.

    A recomputed layer keeps its input. One layer at a time, recomputed or without a backward pass,
    has all its activations.

    Args:
        layer: bytes of all its activations, and of those inside its MLP.
        entering: bytes of its input.
        recompute: what is computed again, or ``nothing`` without a backward pass.
    """
    whole, inside = layer
    if recompute == "nothing":
        return 0.0, whole
    if recompute == "full":
        return entering, whole
    if recompute == "selective":
        return whole - inside, inside
    return whole, 0.0


def _vision_layer(vision: Vision, parallel: Parallel, is_trained: bool) -> tuple[float, float]:
    """Count the elements that a vision layer keeps per token, and those of them inside its MLP.

    Replicated: inputs and results of both norms, and both branches before their scale (6
    D). Sharded: queries, keys, values and the output of attention (4 D), the MLP before and after
    GELU (2 M), or its gate, its other half and their product (3 M). A frozen layer needs the inputs
    of the norms, inputs and output of attention, and the input of GELU, or gate and other half.
    """
    tensor = parallel.vision_tensor_size
    width = vision.hidden_size
    inputs = 2 if vision.is_gated else 1
    inner = (inputs + 1 if is_trained else inputs) * vision.ffn_hidden_size / tensor
    return (6 if is_trained else 2) * width + 4 * width / tensor + inner, inner


def _language_layer(
    language: Language, parallel: Parallel, is_trained: bool
) -> tuple[float, float]:
    """Count the elements that a language layer keeps per token, and those of them inside its MLP.

    Inputs and results of both norms (4 D) are replicated, or sharded with sequence parallelism.
    Sharded: queries, keys, values, the output of attention, and the MLP's gate, its other half and
    their product (3 M); or what its experts keep (``_expert_layer``), and the shared one as an MLP.
    Normalised queries and keys are kept twice. A frozen layer needs neither the results of the
    norms nor that product. Norms behind the branches keep their inputs (2 D), which are computed
    again with the MLP for one of them.
    """
    tensor = parallel.tensor_model_parallel_size
    width = language.hidden_size
    queries, keys = (
        count * language.head_size
        for count in (language.num_attention_heads, language.num_query_groups)
    )
    attention = (
        2 * queries
        + 2 * max(keys, tensor * language.head_size)
        + (queries + keys) * language.qk_norm
    )
    inputs = 2 if language.is_gated else 1
    inner = (inputs + 1 if is_trained else inputs) * language.ffn_hidden_size / tensor
    if language.num_experts:
        inner = _expert_layer(language, parallel, is_trained) / tensor
        inner += (3 if is_trained else 2) * language.shared_expert_ffn_hidden_size / tensor
    width /= tensor if parallel.sequence_parallel else 1
    behind = width if language.sandwich_norm else 0
    norms = (4 if is_trained else 2) * width + behind
    return norms + attention / tensor + inner + behind, inner + behind


def _expert_layer(language: Language, parallel: Parallel, is_trained: bool) -> float:
    """Count the elements that the experts of a layer keep per token, for tokens spread evenly: for
    each of its experts the token itself, gate, other half and their product, before and after the
    router's weight (D + 4 M; frozen: 3 M); logits, probabilities and weights of the router, in
    float32; and two integers of 32 bits for each expert, by which tokens are sorted. Ranks that
    share an expert have the tokens of all of them, and a share of M.
    """
    inner = language.expert_ffn_hidden_size
    read = parallel.expert_tensor_parallel_size * language.hidden_size
    of_expert = read + 4 * inner if is_trained else 3 * inner
    return language.experts_per_token * of_expert + 10 * language.num_experts
