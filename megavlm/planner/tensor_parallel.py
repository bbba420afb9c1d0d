"""What tensor-parallel ranks send for each other's layers, in elements.

The first linear layer of attention and of an MLP is cut by columns, the last one by rows (Shoeybi
et al., arXiv 1909.08053): the forward pass sums what the last one gives, the backward pass the
gradient of what the first one reads. With sequence parallelism (arXiv 2205.05198) the first one
gathers what it reads, and the last one reduces and scatters; the backward pass has the opposite of
each, and a first layer that is trained gathers what it read again. Adapters beside a layer do so
with the numbers between their factors.

A ring of k ranks sends (k - 1) / k of what is gathered, or reduced and scattered, and twice that of
what is summed. Sums of one number a token, such as those of the loss, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megavlm.config.freeze_mask import matches_any, trains
from megavlm.config.lora import stacked
from megavlm.config.pieces import Piece
from megavlm.config.schema import Architecture, Config
from megavlm.planner.flops import pieces, with_gradients
from megavlm.planner.layout import Chunk
from megavlm.planner.partition import layer_of
from megavlm.planner.rank_load import RankLoad

_COLUMNS = ("linear_qkv", "linear_fc1", "linear_q")
_ROWS = ("linear_proj", "linear_fc2")
_OF_TILES = ("linear_k", "linear_v")


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A linear layer that tensor-parallel ranks share, or an adapter beside one.

    Args:
        width: elements of a row of what it reads if it is cut by columns, else of what it gives.
        is_row: whether it is cut by rows.
        is_of_tiles: whether it reads the features of all tiles, which sequence parallelism leaves
            whole.
        is_in_mlp: whether it is computed again if the MLP is.
        has_gradient: whether the backward pass comes through it.
        gathers_again: whether its gradient needs what it read.
    """

    width: int
    is_row: bool
    is_of_tiles: bool
    is_in_mlp: bool
    has_gradient: bool
    gathers_again: bool

    def forward(self, is_scattered: bool) -> int:
        """Count the elements of a row that the forward pass gathers or scatters."""
        if is_scattered and not self.is_of_tiles:
            return self.width
        return 2 * self.width if self.is_row else 0

    def backward(self, is_scattered: bool) -> int:
        """Count those of the backward pass, if it comes through, without what is computed again."""
        if is_scattered and not self.is_of_tiles:
            return (2 if self.gathers_again else 1) * self.width
        return 0 if self.is_row else 2 * self.width


def sent_to_tensor_ranks(config: Config, chunk: Chunk, load: RankLoad) -> float:
    """Count the elements that a rank sends for one microbatch's pass through a chunk."""
    arch = config.architecture
    parallel = config.parallel
    ranks = parallel.tensor_model_parallel_size
    if ranks == 1:
        return 0.0
    found = 0.0
    recompute = (parallel.recompute_of("vision"), parallel.recompute_of("language"))
    layers = _by_layer(arch, config.training.trainable, parallel.sequence_parallel, recompute)
    for layer in chunk.layer_numbers(arch.vision.num_layers):
        in_vision = layer < arch.vision.num_layers
        if in_vision and parallel.vision == "data":
            continue
        of_token, of_tile = layers[layer]
        tokens = load.tiles * arch.vision.layer_tokens if in_vision else load.tokens
        found += tokens * of_token + load.tiles * parallel.tile_ranks * of_tile
    if chunk.has_connector:
        found += _at_connector(config, load)
    if chunk.has_head and arch.needs.has_vocabulary_head:
        found += _at_head(config, load)
    return (ranks - 1) / ranks * found


@lru_cache(maxsize=256)
def _by_layer(
    arch: Architecture, trainable: tuple[str, ...], is_scattered: bool, recompute: tuple[str, str]
) -> tuple[tuple[int, int], ...]:
    """Count the elements for each token, and for each tile, of each layer of the whole model.

    Args:
        arch: the model.
        trainable: freeze mask.
        is_scattered: whether the language model has sequence parallelism.
        recompute: what is computed again, of the vision encoder and of the language model.
    """
    found = []
    for layer, linears in enumerate(_linears(arch, trainable)):
        in_vision = layer < arch.vision.num_layers
        of_part = recompute[0] if in_vision else recompute[1]
        sums = {False: 0, True: 0}
        for one, sent in _sent(linears, is_scattered and not in_vision, of_part):
            sums[one.is_of_tiles] += sent
        found.append((sums[False], sums[True] * arch.features_per_tile))
    return tuple(found)


def _sent(
    linears: Sequence[_Linear], is_scattered: bool, recompute: str
) -> Iterator[tuple[_Linear, int]]:
    """Yield the linear layers of a layer, and the elements that are sent for a row of each."""
    has_backward = any(one.has_gradient for one in linears)
    for one in linears:
        is_again = recompute == "full" or (recompute == "selective" and one.is_in_mlp)
        sent = one.forward(is_scattered) * (2 if has_backward and is_again else 1)
        # The input of layers that are computed again, or whose MLP is, asks for a gradient.
        if one.has_gradient or (has_backward and recompute != "none"):
            sent += one.backward(is_scattered)
        yield one, sent


@lru_cache(maxsize=64)
def _linears(arch: Architecture, trainable: tuple[str, ...]) -> tuple[tuple[_Linear, ...], ...]:
    """Return the linear layers and adapters of each layer. Experts are not among them: their tokens
    go where sequence parallelism has them.
    """
    vision = arch.vision.num_layers
    layers: list[list[_Linear]] = [[] for _ in range(vision + arch.language.num_layers)]
    for piece, passes in with_gradients(pieces(arch), trainable):
        stem, _, kind = piece.key.rpartition(".")
        is_adapter = piece.key.endswith(".lora.a")
        stem = stem.removesuffix(".lora")
        name = stem.rpartition(".")[2]
        if (
            piece.layer is None
            or piece.expert is not None
            or name not in (*_COLUMNS, *_ROWS, *_OF_TILES)
            or not (is_adapter or kind == "weight")
        ):
            continue
        layers[layer_of(piece, vision, len(layers))].append(
            _Linear(
                width=_width(arch, piece, name, stem if is_adapter else ""),
                is_row=name in _ROWS,
                is_of_tiles=name in _OF_TILES,
                is_in_mlp=".mlp." in piece.key,
                has_gradient=passes > 1,
                gathers_again=not is_adapter
                and name in _COLUMNS
                and matches_any(piece.key, trainable),
            )
        )
    return tuple(tuple(found) for found in layers)


def _width(arch: Architecture, piece: Piece, name: str, adapted: str) -> int:
    """Return the width of ``_Linear``; ``adapted`` is the layer beside an adapter, if it is one."""
    if adapted:
        return arch.lora.rank * stacked(arch, f"{adapted}.weight")
    if name in _OF_TILES:
        return arch.memory_size
    return (arch.vision if piece.part == "vision" else arch.language).hidden_size


def _at_connector(config: Config, load: RankLoad) -> float:
    """Count the elements that connector and embedding sum or gather per microbatch."""
    arch = config.architecture
    parallel = config.parallel
    sizes = arch.connector_sizes
    ranks = parallel.tensor_model_parallel_size
    found = 0.0
    if parallel.vision == "tensor":
        found = 2 * load.tiles * sizes.all_reduced_elements
        # The gradient of what its first matrix reads is made as soon as that matrix is trained.
        if found and any(
            trains(part, config.training.trainable) for part in ("vision", "connector")
        ):
            found += 2 * load.tiles * sizes.features * sizes.feature_size
    elif arch.language.exists:  # each rank gathers the features of all
        width = arch.needs.connector_output(arch)
        found = ranks * load.tiles * arch.features_per_tile * width
    else:  # and what the connector reads, if it ends the model
        found = ranks * load.tiles * arch.vision.layer_tokens * arch.vision.hidden_size
    if not arch.language.exists:
        return found
    # Embeddings are summed; sequence parallelism gathers their gradients.
    gathers = parallel.sequence_parallel and _trains_before_language(
        arch, config.training.trainable
    )
    return found + load.tokens * arch.language.hidden_size * (3 if gathers else 2)


@lru_cache(maxsize=64)
def _trains_before_language(arch: Architecture, trainable: tuple[str, ...]) -> bool:
    """Return whether the tokens that enter the first layer of the language model have a gradient.
    Features that cross-attention reads are not among them.
    """
    parts = ("language",) if arch.cross_attention.every else ("vision", "connector", "language")
    return any(
        matches_any(piece.key, trainable)
        for piece in pieces(arch)
        if piece.part in parts and (piece.layer is None or piece.part != "language")
    )


def _at_head(config: Config, load: RankLoad) -> float:
    """Count the elements that the head gathers and whose gradients it scatters, or sums."""
    arch = config.architecture
    if config.parallel.sequence_parallel:
        return 2 * load.tokens * arch.language.hidden_size
    heads = 2 if arch.added_tokens else 1
    return 2 * heads * load.head_tokens * arch.language.hidden_size
