"""Parameter counts of a rank, by layer and tensor-parallel size.

Norms, scales, biases that are added after an all-reduce, and the patch embedding are replicated on
every tensor-parallel rank; matrices, and biases before an all-reduce, are sharded. Vocabulary and
heads are padded so that they divide. Norm and router before experts are replicated.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

from megavlm.config.freeze_mask import matches_any
from megavlm.config.lora import MAGNITUDE, is_adapter
from megavlm.config.optimizer import Kind
from megavlm.config.padding import padded_heads, padded_vocabulary
from megavlm.config.parameter_groups import is_orthogonalised
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import Piece, pieces
from megavlm.planner.layout import Chunk
from megavlm.planner.partition import layer_of

_SHARDED = (
    *("linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight"),
    *("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight"),
    *("linear_q.weight", "linear_k.weight", "linear_v.weight"),
    *("qk_norm.query", "qk_norm.key", "core_attention.softmax_offset"),
    *("word_embeddings.weight", "output_layer.weight"),
    *("linear_qkv.lora.b", "linear_fc1.lora.b", "linear_proj.lora.a", "linear_fc2.lora.a"),
    *(f"linear_qkv{MAGNITUDE}", f"linear_fc1{MAGNITUDE}"),
)
_BY_HEADS = (
    f"linear_qkv{MAGNITUDE}",
    "linear_qkv.lora.b",
    "linear_proj.lora.a",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_proj.weight",
    "qk_norm.query",
    "qk_norm.key",
)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameter counts on one rank.

    Args:
        weights: in all tensors.
        trained: in those that are trained.
        trained_replicas: of these, in tensors that every tensor-parallel rank has whole and whose
            gradients are summed over these ranks.
        in_fp8: elements of weights that have FP8 copies.
        trained_experts: of ``trained``, in experts, whose optimizer state is sharded over other
            ranks.
        trained_by_muon: of ``trained``, in weights outside experts that Muon updates.
        trained_experts_by_muon: the same of experts.
        cut_by_muon: of ``trained_by_muon``, in weights that tensor-parallel ranks share.
        in_nf4: of ``weights``, those that are kept in 4 bits.
        largest_in_nf4: of these, those in the largest tensor.
    """

    weights: int = 0
    trained: int = 0
    trained_replicas: int = 0
    in_fp8: int = 0
    trained_experts: int = 0
    trained_by_muon: int = 0
    trained_experts_by_muon: int = 0
    cut_by_muon: int = 0
    in_nf4: int = 0
    largest_in_nf4: int = 0

    def __add__(self, other: ParameterCounts) -> ParameterCounts:
        sums = {name: count + vars(other)[name] for name, count in vars(self).items()}
        largest = max(self.largest_in_nf4, other.largest_in_nf4)
        return ParameterCounts(**sums | {"largest_in_nf4": largest})

    def times(self, count: int) -> ParameterCounts:
        """Return the counts of ``count`` tensors, each with these."""
        if count == 1:
            return self
        largest = self.largest_in_nf4 if count else 0
        sums = {name: value * count for name, value in vars(self).items()}
        return ParameterCounts(**sums | {"largest_in_nf4": largest})


def parameters_on_rank(config: Config, chunk: Chunk) -> ParameterCounts:
    """Count the parameters of a chunk on one rank."""
    arch = config.architecture
    sharding = _sharding_of(config)
    found = _layers(sharding, chunk.layer_numbers(arch.vision.num_layers))
    if chunk.has_head and not chunk.has_connector and arch.language.tied_head:
        found += _embedding(sharding)  # the head has a copy
    return found


def replicated_head(config: Config, chunks: tuple[Chunk, ...]) -> int:
    """Count the parameters of a tied head on a rank if it is a replica whose gradient is summed
    with that of the token embedding; else 0.
    """
    is_replica = config.architecture.language.tied_head and not chunks[-1].has_connector
    return _embedding(_sharding_of(config)).trained if is_replica else 0


def is_trained(piece: Piece, trainable: tuple[str, ...]) -> bool:
    """Whether a freeze mask trains a weight."""
    return matches_any(piece.key, trainable)


@dataclass(frozen=True, kw_only=True)
class _Sharding:
    """What the parameter counts depend on.

    Args:
        arch: the model.
        trainable: freeze mask.
        kind: of the optimizer.
        vision, language: tensor-parallel size of each part.
        fp8: parts whose layers have an FP8 recipe.
        expert: expert-parallel size.
        shared: ranks that share an expert.
        is_scattered: whether tensor-parallel ranks share the tokens between layers.
    """

    arch: Architecture
    trainable: tuple[str, ...]
    kind: Kind
    vision: int
    language: int
    fp8: tuple[str, ...] = ()
    expert: int = 1
    shared: int = 1
    is_scattered: bool = False


def _sharding_of(config: Config) -> _Sharding:
    parallel = config.parallel
    return _Sharding(
        arch=config.architecture,
        trainable=config.training.trainable,
        kind=config.optimizer.kind,
        vision=parallel.vision_tensor_size,
        language=parallel.tensor_model_parallel_size,
        fp8=tuple(config.fp8.recipes),
        expert=parallel.expert_model_parallel_size,
        shared=parallel.expert_tensor_parallel_size,
        is_scattered=parallel.sequence_parallel,
    )


@lru_cache(maxsize=4096)
def _embedding(sharding: _Sharding) -> ParameterCounts:
    piece = next(
        piece for piece in pieces(sharding.arch) if piece.key.endswith("word_embeddings.weight")
    )
    return _counts(piece, sharding)


@lru_cache(maxsize=65536)
def _layers(sharding: _Sharding, layer_numbers: range) -> ParameterCounts:
    return sum(_by_layer(sharding)[layer_numbers.start : layer_numbers.stop], ParameterCounts())


@lru_cache(maxsize=4096)
def _by_layer(sharding: _Sharding) -> tuple[ParameterCounts, ...]:
    """Return the counts of each layer, with embeddings, connector and head on their layers."""
    arch = sharding.arch
    table = [ParameterCounts()] * (arch.vision.num_layers + arch.language.num_layers)
    own = arch.language.num_experts // sharding.expert  # those of the first expert-parallel rank
    for layer, piece, experts in _weights(arch, sharding.trainable):
        times = bisect_left(experts, own) if experts else 1
        table[layer] += _counts(piece, sharding).times(times)
    return tuple(table)


@lru_cache(maxsize=8)
def _weights(
    arch: Architecture, trainable: tuple[str, ...]
) -> tuple[tuple[int, Piece, tuple[int, ...]], ...]:
    """Return the weights with their layers; experts of a layer that are alike are one entry with
    the numbers of all of them, since there may be a hundred.
    """
    layers = arch.vision.num_layers + arch.language.num_layers
    alike: dict[tuple, tuple[Piece, list[int]]] = {}
    for piece in pieces(arch):
        if not piece.elements:
            continue
        layer = layer_of(piece, arch.vision.num_layers, layers)
        name = piece.key.replace(f".experts.{piece.expert}.", ".experts.")
        trained = is_trained(piece, trainable)
        _, experts = alike.setdefault((layer, name, piece.elements, trained), (piece, []))
        experts += [] if piece.expert is None else [piece.expert]
    return tuple((layer, piece, tuple(found)) for (layer, *_), (piece, found) in alike.items())


def _counts(piece: Piece, sharding: _Sharding) -> ParameterCounts:
    before_language = piece.part in ("vision", "connector")
    ranks = sharding.vision if before_language else sharding.language
    elements = piece.elements
    if piece.key.endswith(("word_embeddings.weight", "output_layer.weight")):
        elements = sharding.arch.language.hidden_size * padded_vocabulary(
            sharding.arch.language.vocab_size
        )
    elif piece.part == "vision" and piece.key.endswith(_BY_HEADS):
        heads = sharding.arch.vision.num_attention_heads
        elements = elements // heads * padded_heads(heads, ranks)
    is_cut = piece.expert is None and piece.key.endswith(_SHARDED)
    if piece.expert is not None:
        elements = elements // sharding.shared
    elif is_cut:
        elements = elements // ranks
    trained = elements if is_trained(piece, sharding.trainable) else 0
    is_replicated = piece.expert is None and _is_summed(piece, sharding, is_cut)
    # Adapters and the gate of a shared expert are multiplied in 16 bits, routers in 32.
    in_16_bits = is_adapter(piece.key) or piece.key.endswith((".router.weight", ".gate_weight"))
    is_product = piece.layer is not None and piece.forward > 0 and not in_16_bits
    by_muon = trained if is_orthogonalised(piece.key, sharding.kind) else 0
    in_nf4 = elements if sharding.arch.lora.quantises(piece.key) else 0
    return ParameterCounts(
        weights=elements,
        trained=trained,
        trained_replicas=trained if is_replicated else 0,
        in_fp8=elements if is_product and piece.part in sharding.fp8 else 0,
        trained_experts=trained if piece.expert is not None else 0,
        trained_by_muon=by_muon if piece.expert is None else 0,
        trained_experts_by_muon=by_muon if piece.expert is not None else 0,
        cut_by_muon=by_muon if is_cut and ranks > 1 else 0,
        in_nf4=in_nf4,
        largest_in_nf4=in_nf4,
    )


def _is_summed(piece: Piece, sharding: _Sharding, is_cut: bool) -> bool:
    """Return whether tensor-parallel ranks sum the gradients of a weight: each of them has tiles of
    its own, tokens of its own, or heads of its own; or a connector that is not cut, or embeddings
    of its own, whose copies must not drift apart.
    """
    if sharding.language == 1:
        return False
    if piece.part in ("vision", "connector") and sharding.vision == 1:
        return True
    if piece.part == "connector":
        is_whole = not sharding.arch.connector_sizes.all_reduced_elements
        return is_whole or piece.key.endswith(".newline")
    # megatron-core's ``finalize_model_grads`` knows norms of heads by their names.
    if ".added_" in piece.key or ".q_layernorm." in piece.key or ".k_layernorm." in piece.key:
        return True
    of_tokens = piece.layer is not None or ".final_layernorm." in piece.key
    # Norms of the heads of cross-attention sum their gradients in the backward pass already.
    is_of_heads = piece.key.endswith((".query_norm.weight", ".key_norm.weight"))
    return (
        sharding.is_scattered
        and piece.part != "vision"
        and of_tokens
        and not (is_cut or is_of_heads)
    )
