"""What a step costs: the floating point operations that the model itself asks for, by part.

**What is counted.** The multiplications and additions of all matrix products, two for each pair of
numbers: a linear layer from m to n costs 2mn a token, attention 4nnD for n tokens that see each
other over D (heads times head size). These are model FLOPs (Chowdhery et al., "PaLM", arXiv
2204.02311, appendix B; Korthikanti et al., arXiv 2205.05198, section 6.3, which also tells them
from hardware FLOPs): what is computed again to save memory, padding (of packs, tiles and
vocabulary), and zeros beside an adapter's B, take time but do not count. Norms, activations,
softmax and the optimizer are left out, as in both papers. Causal attention is counted by half,
since only half of the pairs see each other; both papers count all of them. Of a prefix-LM all pairs
are counted: what its n answer tokens of a sample of m do not see, n (m - n) + n^2 / 2 pairs, is
little beside its prefix with the image, which sees itself whole with sliding windows, too. With a
sliding window each token of another model is counted with a whole window; the first ones of a
sample see less. So is each patch in windows of an image, of which those at its edges are smaller.
A patch embedding that reads several frames is counted for one: an image shows it the same pixels in
all of them.

**The backward pass** of a product with a weight has two products, each as large as the forward one:
the gradient of its input and that of its weight. A frozen weight has no gradient, and the gradient
of an input is needed only if something that is trained comes before it. So with everything trained
a step costs three forward passes; in the first stage, which trains the connector alone, the vision
encoder costs one forward pass, and the language model a forward pass and the gradients of its
activations.

Of a mixture of experts only the experts that a token takes are counted (active FLOPs), and the
router.

The head is counted for the tokens that have a loss: no other logit is asked for, whether or not an
implementation computes it.

Everything grows in proportion to five counts of the data, which the packs' index holds: tiles,
tokens, supervised tokens, the sum of the samples' squared lengths and, if patches see all tiles of
their image, that of the images' squared tiles. Shape letters as in ``model/``: P patches of a tile,
F features of a tile, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megavlm.config import cross_attention
from megavlm.config.freeze_mask import matches_any
from megavlm.config.lora import MAGNITUDE, stacked
from megavlm.config.objectives import EMBEDDING
from megavlm.config.pieces import Piece, Unit, linear, norm, products, table, vector
from megavlm.config.schema import Architecture, Language, Vision

PARTS = ("vision", "connector", "language", "head")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """FLOPs of training on a tile, on a token, and for each pair of tokens of a sample or of tiles
    of an image: by part and unit.
    """

    by_unit: dict[str, dict[Unit, float]]

    def by_part(
        self,
        *,
        tokens: float,
        squared_lengths: float,
        tiles: float,
        squared_tiles: float = 0.0,
        supervised: float | None = None,
    ) -> dict[str, float]:
        """Count the FLOPs of each part for data of this size.

        Args:
            tokens: of all samples, context tokens of images included, padding not.
            squared_lengths: sum over the samples of the square of their tokens.
            tiles: real tiles.
            squared_tiles: sum over the images of the square of their tiles.
            supervised: tokens that have a loss; none: all.
        """
        counts = {
            "tile": tiles,
            "token": tokens,
            "supervised": tokens if supervised is None else supervised,
            "squared_length": squared_lengths,
            "squared_tile": squared_tiles,
        }
        return {
            part: sum(flops * counts[unit] for unit, flops in units.items())
            for part, units in self.by_unit.items()
        }

    def total(self, **size: float | None) -> float:
        """Count the FLOPs of the whole model; arguments as for ``by_part``."""
        return sum(self.by_part(**size).values())


def training_cost(architecture: Architecture, trainable: Sequence[str]) -> Cost:
    """Compute the cost of forward and backward pass under a freeze mask.

    Args:
        architecture: the model.
        trainable: parts, or patterns of checkpoint keys, as in ``training.trainable``; empty: the
            forward pass alone.
    """
    by_unit: dict[str, dict[Unit, float]] = {part: {} for part in PARTS}
    for piece, passes in with_gradients(pieces(architecture), trainable):
        units = by_unit[piece.part]
        units[piece.unit] = units.get(piece.unit, 0) + piece.forward * passes
    return Cost(by_unit=by_unit)


def with_gradients(
    pieces: Iterable[Piece], trainable: Sequence[str]
) -> Iterator[tuple[Piece, int]]:
    """Each piece with how many times its forward pass it costs in all under a freeze mask: 1, 2 or
    3.
    """
    trained_anywhere = trained_before = trained_before_experts = False
    expert = None
    for piece in pieces:
        if piece.expert is None:
            trained_before = trained_anywhere
        elif piece.expert != expert:  # all experts of a layer read the same
            trained_before_experts = trained_before if expert is None else trained_before_experts
            trained_before = trained_before_experts
        expert = piece.expert
        is_trained = matches_any(piece.key, trainable)
        # Both factors of attention's products are activations, so each product has two gradients or
        # none.
        gradients = is_trained + trained_before if piece.key else 2 * trained_before
        yield piece, 1 + gradients
        trained_before |= is_trained
        trained_anywhere |= is_trained


def pieces(architecture: Architecture) -> Iterator[Piece]:
    """Every weight of the model, and its attention, in the order of the forward pass."""
    for piece in _base_pieces(architecture):
        yield piece
        if architecture.lora.adapts(piece.key):
            yield from _adapter(architecture, piece)


def _base_pieces(architecture: Architecture) -> Iterator[Piece]:
    yield from _vision(architecture)
    yield from architecture.connector_sizes.pieces()
    yield from _language(architecture)


def _adapter(architecture: Architecture, piece: Piece) -> Iterator[Piece]:
    """Yield the factors of the adapter beside a linear layer."""
    vision = architecture.vision
    language = architecture.language
    inputs = {
        "vision": (vision.hidden_size, vision.hidden_size, vision.ffn_hidden_size),
        "language": (
            language.hidden_size,
            language.num_attention_heads * language.head_size,
            language.ffn_hidden_size if piece.expert is None else language.expert_ffn_hidden_size,
        ),
    }[piece.part]
    stem = piece.key.removesuffix(".weight")
    of_layer = inputs[0]
    if stem.endswith("linear_proj"):
        of_layer = inputs[1]
    elif stem.endswith("linear_fc2"):
        of_layer = inputs[2]
    rank = architecture.lora.rank
    rows = piece.forward / (2 * piece.elements)
    sizes = {
        "a": stacked(architecture, piece.key) * rank * of_layer,
        "b": piece.elements // of_layer * rank,
    }
    for name, elements in sizes.items():
        yield replace(
            piece, key=f"{stem}.lora.{name}", elements=elements, forward=2 * elements * rows
        )
    if architecture.lora.dora:
        outputs = piece.elements // of_layer
        yield replace(piece, key=stem + MAGNITUDE, elements=outputs, forward=0, is_matrix=False)


def _vision(architecture: Architecture) -> Iterator[Piece]:
    vision = architecture.vision
    if not vision.exists:
        return
    part = "vision"
    width = vision.hidden_size
    yield _patch_embedding(vision)
    if vision.has_patch_bias:
        yield vector("vision.patch_embedding.bias", part, width)
    if vision.has_class_token:
        yield vector("vision.class_token", part, width)
    if vision.has_learned_positions:
        yield table("vision.position_embedding", part, vision.position_rows, width)
    if vision.has_embedding_norm:
        yield from norm("vision.embedding_norm", part, width, has_bias=True)
    for number in range(vision.num_layers):
        yield from (replace(piece, layer=number) for piece in _vision_layer(architecture, number))
    if vision.final_norm:
        last = norm("vision.final_norm", part, width, has_bias=True)
        yield from (replace(piece, layer=vision.num_layers - 1) for piece in last)


def _patch_embedding(vision: Vision) -> Piece:
    """Return the weight of the patch embedding."""
    elements = 3 * vision.patch_size**2 * vision.hidden_size
    return Piece(
        key="vision.patch_embedding.weight",
        part="vision",
        elements=elements * vision.temporal_patch_size,
        forward=2 * elements * vision.grid**2,
        unit="tile",
        is_matrix=True,
    )


def _vision_layer(architecture: Architecture, number: int) -> Iterator[Piece]:
    vision = architecture.vision
    part = "vision"
    has_bias = architecture.vision.normalization == "LayerNorm"
    width = vision.hidden_size
    inner = vision.ffn_hidden_size
    rows = vision.layer_tokens
    layer = f"vision.encoder.layers.{number}"
    qkv, proj, fc1, fc2 = (f"{layer}.{name}" for name in _LINEARS)
    yield from norm(qkv, part, width, has_bias=has_bias, joint=".layer_norm_")
    yield from linear(qkv, part, width, 3 * width, rows=rows, unit="tile", has_bias=vision.qkv_bias)
    for name in ("query", "key") if vision.qk_norm else ():
        yield vector(f"{layer}.self_attention.qk_norm.{name}", part, width)
    yield _vision_attention(vision, number)
    yield from linear(proj, part, width, width, rows=rows, unit="tile", has_bias=True)
    if vision.has_layer_scale:
        yield vector(f"{layer}.attention_scale", part, width)
    yield from norm(fc1, part, width, has_bias=has_bias, joint=".layer_norm_")
    first = 2 * inner if vision.is_gated else inner
    yield from linear(fc1, part, width, first, rows=rows, unit="tile", has_bias=True)
    yield from linear(fc2, part, inner, width, rows=rows, unit="tile", has_bias=True)
    if vision.has_layer_scale:
        yield vector(f"{layer}.mlp_scale", part, width)


def _vision_attention(vision: Vision, number: int) -> Piece:
    """Return the products of a vision layer's attention: inside a tile, a window or an image."""
    pairs = vision.layer_tokens**2
    unit: Unit = "tile"
    if vision.has_window(number):
        pairs *= vision.window_tiles**2
    elif vision.spans_tiles:
        unit = "squared_tile"
    return products("vision", 4 * pairs * vision.hidden_size, unit)


def _language(architecture: Architecture) -> Iterator[Piece]:
    language = architecture.language
    if not language.exists:
        yield from architecture.needs.head(architecture)
        return
    width = language.hidden_size
    # Looked up, not multiplied.
    yield table(EMBEDDING, "language", architecture.table_rows, width)
    if architecture.added_tokens:
        yield table("language.added_embedding.weight", "language", architecture.added_tokens, width)
    if language.has_learned_positions:
        positions = "language.embedding.position_embeddings.weight"
        yield table(positions, "language", language.position_rows, width)
    for number in range(language.num_layers):
        layer = (
            *cross_attention.pieces(architecture, number),
            *_language_layer(architecture, number),
        )
        yield from (replace(piece, layer=number) for piece in layer)
    yield from architecture.needs.head(architecture)


def _language_layer(architecture: Architecture, number: int) -> Iterator[Piece]:
    language = architecture.language
    part = "language"
    width = language.hidden_size
    inner = language.ffn_hidden_size
    has_bias = language.has_layer_norm
    queries, keys = (
        count * language.head_size
        for count in (language.num_attention_heads, language.num_query_groups)
    )
    layer = f"language.decoder.layers.{number}"
    qkv, proj, fc1, fc2 = (f"{layer}.{name}" for name in _LINEARS)
    yield from norm(qkv, part, width, has_bias=has_bias, joint=".layer_norm_")
    yield from linear(
        qkv, part, width, queries + 2 * keys, rows=1, unit="token", has_bias=language.qkv_bias
    )
    for name in ("q_layernorm", "k_layernorm") if language.qk_norm else ():
        key = f"{layer}.self_attention.{name}"
        yield from norm(key, part, language.head_size, has_bias=has_bias)
    yield _attention(architecture, number, queries)
    if language.attention_sinks:
        sinks = f"{layer}.self_attention.core_attention.softmax_offset"
        yield vector(sinks, part, language.num_attention_heads)
    yield from linear(proj, part, queries, width, rows=1, unit="token", has_bias=language.has_bias)
    if language.sandwich_norm:
        yield from norm(f"{layer}.post_attention_norm", part, width, has_bias=has_bias)
    if language.num_experts:
        yield from _experts(language, layer)
    else:
        yield from norm(fc1, part, width, has_bias=has_bias, joint=".layer_norm_")
        first = 2 * inner if language.is_gated else inner
        sizes = dict(rows=1, unit="token", has_bias=language.has_bias)
        yield from linear(fc1, part, width, first, **sizes)
        yield from linear(fc2, part, inner, width, **sizes)
    if language.sandwich_norm:
        yield from norm(f"{layer}.post_mlp_norm", part, width, has_bias=has_bias)


def _attention(architecture: Architecture, number: int, queries: int) -> Piece:
    """Return the products of a layer's attention, over all heads of ``queries`` numbers."""
    language = architecture.language
    window = language.window_of(number)
    if window and not architecture.prefix_lm:
        return Piece(
            key="", part="language", elements=0, forward=4 * queries * window, unit="token"
        )
    sees_all = architecture.prefix_lm or not language.is_causal
    pairs = 4 if sees_all else 2  # half of 4: causal
    return Piece(
        key="", part="language", elements=0, forward=pairs * queries, unit="squared_length"
    )


def _experts(language: Language, layer: str) -> Iterator[Piece]:
    """Yield the norm, the router, the shared expert and the experts of a layer; each expert's part
    of the FLOPs is that of tokens spread evenly.
    """
    part = "language"
    width = language.hidden_size
    inner = language.expert_ffn_hidden_size
    count = language.num_experts
    yield from norm(f"{layer}.pre_mlp_layernorm", part, width, has_bias=False)
    router = f"{layer}.mlp.router"
    has_bias = language.has_bias
    yield from linear(router, part, width, count, rows=1, unit="token", has_bias=has_bias)
    if shared := language.shared_expert_ffn_hidden_size:
        stem = f"{layer}.mlp.shared_experts"
        sizes = dict(rows=1, unit="token", has_bias=False)
        yield from linear(f"{stem}.linear_fc1", part, width, 2 * shared, **sizes)
        yield from linear(f"{stem}.linear_fc2", part, shared, width, **sizes)
        if language.shared_expert_gate:
            gate = linear(stem, part, width, 1, **sizes)
            yield from (replace(piece, key=f"{stem}.gate_weight") for piece in gate)
    for expert in range(count):
        for name, inputs, outputs in (
            ("linear_fc1", width, 2 * inner),
            ("linear_fc2", inner, width),
        ):
            yield Piece(
                key=f"{layer}.mlp.experts.{expert}.{name}.weight",
                part=part,
                elements=inputs * outputs,
                forward=2 * inputs * outputs * language.experts_per_token / count,
                unit="token",
                is_matrix=True,
                expert=expert,
            )
            if has_bias:
                bias = f"{layer}.mlp.experts.{expert}.{name}.bias"
                yield replace(vector(bias, part, outputs), expert=expert)


_LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
