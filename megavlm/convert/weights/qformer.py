"""The weights of a Q-Former, as ``transformers`` names them in BLIP-2 and InstructBLIP.

Shape letters: D hidden size, V width of the vision encoder, M hidden size of an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megavlm.config.image_text import START_TEMPERATURE
from megavlm.config.qformer import QFormer
from megavlm.config.schema import Architecture
from megavlm.convert.weights.families import eva
from megavlm.convert.weights.mapping import Row, linear, norm, within
from megavlm.convert.weights.transforms import Absent, Reshaped, Stacked


@dataclass(frozen=True, kw_only=True)
class Names:
    """What classes of ``transformers`` call the embeddings of a Q-Former, each otherwise."""

    embedding_norm: str
    embeddings: str


BLIP2 = Names(embedding_norm="qformer.layernorm", embeddings="embeddings.")
INSTRUCT_BLIP = Names(
    embedding_norm="qformer.embeddings.layernorm", embeddings="qformer.embeddings."
)


def rows(architecture: Architecture, names: Names = BLIP2) -> list[Row]:
    """List the weights of the connector ``qformer``, the norm behind the vision encoder
    included.
    """
    settings = architecture.connector.qformer
    width = settings.hidden_size
    memory = architecture.vision.hidden_size
    queries = (settings.queries, width)
    found = [
        *norm("norm.", "vision_model.post_layernorm", memory, "LayerNorm"),
        Row("queries", ("query_tokens",), queries, Reshaped((1, *queries), queries)),
        *norm("embedding_norm.", names.embedding_norm, width, "LayerNorm"),
    ]
    if settings.text:
        sizes = {"token": settings.vocab_size, "position": settings.max_position_embeddings}
        words = {"token": "word_embeddings", "position": "position_embeddings"}
        for name, size in sizes.items():
            there = f"{names.embeddings}{words[name]}.weight"
            found.append(Row(f"{name}_embedding.weight", (there,), (size, width)))
    for number in range(settings.num_layers):
        layer = _layer(settings, memory, number)
        found += within(layer, f"layers.{number}.", f"qformer.encoder.layer.{number}.")
    if output_size := architecture.needs.connector_output(architecture):
        found += linear("output", ("language_projection",), (output_size, width))
    return found


def retrieval_rows(architecture: Architecture) -> tuple[Row, ...]:
    """List every weight of a model of the objective qformer, as ``Blip2ForImageTextRetrieval``
    names them. It has no temperature and no head that generates; those stay in checkpoints.
    """
    width = architecture.connector.qformer.hidden_size
    embedding = (architecture.image_text.size, width)
    absent: dict[str, tuple[tuple[int, ...], float]] = {
        "temperature": ((1,), START_TEMPERATURE),
        "transform.weight": ((width, width), 1.0),
        "transform.bias": ((width,), 0.0),
        "transform_norm.weight": ((width,), 1.0),
        "transform_norm.bias": ((width,), 0.0),
        "vocabulary_bias": ((architecture.connector.qformer.vocab_size,), 0.0),
    }
    return (
        *within(eva.rows(architecture.vision), "vision.", "vision_model."),
        *within(rows(architecture), "connector.", ""),
        *linear("objective.image_projection", ("vision_projection",), embedding),
        *linear("objective.text_projection", ("text_projection",), embedding),
        *linear("objective.matching", ("itm_head",), (2, width)),
        *(
            Row(f"objective.{key}", (), shape, Absent(shape, start))
            for key, (shape, start) in absent.items()
        ),
    )


def _layer(settings: QFormer, memory_size: int, number: int) -> Iterator[Row]:
    """Yield the weights of one layer, without prefixes."""
    width = settings.hidden_size
    square = (width, width)
    own = "attention.attention"
    parts = (f"{own}.query", f"{own}.key", f"{own}.value")
    yield from linear("attention.qkv", parts, (3 * width, width), Stacked(3))
    yield from linear("attention.proj", ("attention.output.dense",), square)
    yield from norm("attention_norm.", "attention.output.LayerNorm", width, "LayerNorm")
    if settings.has_cross_attention(number):
        cross = "crossattention.attention"
        both = (f"{cross}.key", f"{cross}.value")
        yield from linear("cross_attention.query", (f"{cross}.query",), square)
        shape = (2 * width, memory_size)
        yield from linear("cross_attention.key_value", both, shape, Stacked(2))
        yield from linear("cross_attention.proj", ("crossattention.output.dense",), square)
        last = "crossattention.output.LayerNorm"
        yield from norm("cross_attention_norm.", last, width, "LayerNorm")
    yield from _mlp(settings, "query_mlp", "_query")
    if settings.text:
        yield from _mlp(settings, "text_mlp", "")


def _mlp(settings: QFormer, key: str, ending: str) -> Iterator[Row]:
    """Yield the weights of an MLP; those of the queries have names that end in ``_query``."""
    width = settings.hidden_size
    inner = settings.ffn_hidden_size
    yield from linear(f"{key}.up", (f"intermediate{ending}.dense",), (inner, width))
    yield from linear(f"{key}.down", (f"output{ending}.dense",), (width, inner))
    yield from norm(f"{key}_norm.", f"output{ending}.LayerNorm", width, "LayerNorm")
