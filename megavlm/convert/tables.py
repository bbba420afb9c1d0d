"""The table of weights: which tensor of megatron-core is which of Hugging Face's. It is read in both directions.

Shape letters: D hidden size, M hidden size of the MLP, p pixels along a patch, V vocabulary, W width of a feature before the projector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.ops import GroupedQKV, Operation, Same, Shape, Stacked, Vocabulary

_SAME = Same()


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        key: megatron-core's key; ``{}`` stands for the layer's number, from 0.
        names: Hugging Face's names, likewise.
        shape: of megatron-core's whole tensor, without rows that pad the vocabulary.
        operation: between the two.
    """

    key: str
    names: tuple[str, ...]
    shape: Shape
    operation: Operation = _SAME

    @property
    def part_shapes(self) -> tuple[Shape, ...]:
        """Shape of each of Hugging Face's tensors."""
        return self.operation.part_shapes(self.shape)

    def within(self, key: str, name: str, layer: int | str = "{}") -> Row:
        """The row with prefixes in front of key and names, and the layer's number filled in."""
        names = tuple((name + inner).format(layer) for inner in self.names)
        return replace(self, key=(key + self.key).format(layer), names=names)

    def split(self, whole: Tensor) -> dict[str, Tensor]:
        """Hugging Face's tensors from megatron-core's."""
        return dict(zip(self.names, self.operation.split(whole), strict=True))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron-core's tensor from Hugging Face's, in the order of ``names``."""
        return self.operation.join(parts)


def rows(architecture: Architecture) -> tuple[Row, ...]:
    """Every weight of the model, as files of ``InternVLForConditionalGeneration`` name it."""
    vision, language = architecture.vision, architecture.language
    return (
        *(row.within("vision.", "vision_tower.") for row in _vision_stem(vision)),
        *_layers(_vision_layer(vision), "vision.encoder.layers.{}.", "vision_tower.encoder.layer.{}.", vision.num_layers),
        *(row.within("projector.", "multi_modal_projector.") for row in _projector(architecture)),
        *(row.within("language.", "language_model.") for row in _language_ends(language)),
        *_layers(_language_layer(language), "language.decoder.layers.{}.", "language_model.model.layers.{}.", language.num_layers),
    )


def megatron_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of every whole tensor by megatron-core's key, without rows that pad the vocabulary."""
    return {row.key: row.shape for row in rows(architecture)}


def _layers(layer: Sequence[Row], key: str, name: str, count: int) -> Iterator[Row]:
    """The rows of a layer for each layer."""
    return (row.within(key, name, number) for number in range(count) for row in layer)


def _linear(key: str, names: tuple[str, ...], shape: Shape, operation: Operation = _SAME, *, bias: bool = True) -> list[Row]:
    """Weight and, where there is one, bias."""
    found = [Row(f"{key}.weight", tuple(f"{name}.weight" for name in names), shape, operation)]
    if bias:
        found.append(Row(f"{key}.bias", tuple(f"{name}.bias" for name in names), shape[:1], operation))
    return found


def _norm(key: str, name: str, size: int, kind: str) -> list[Row]:
    """A norm's weight and, of a LayerNorm, bias."""
    parts = ("weight", "bias") if kind == "LayerNorm" else ("weight",)
    return [Row(f"{key}{part}", (f"{name}.{part}",), (size,)) for part in parts]


def _vision_stem(vision: Vision) -> list[Row]:
    """What is below the layers of InternViT."""
    width, side = vision.hidden_size, vision.patch_size
    return [
        *_linear("patch_embedding", ("embeddings.patch_embeddings.projection",), (width, 3, side, side)),
        Row("class_token", ("embeddings.cls_token",), (1, 1, width)),
        Row("position_embedding", ("embeddings.position_embeddings",), (1, vision.tokens, width)),
    ]


def _vision_layer(vision: Vision) -> list[Row]:
    """A layer of InternViT."""
    width, inner, heads, kind = vision.hidden_size, vision.ffn_hidden_size, vision.num_attention_heads, vision.normalization
    qkv = GroupedQKV(heads, heads, width // heads)
    projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    return [
        *_norm("self_attention.linear_qkv.layer_norm_", "layernorm_before", width, kind),
        *_linear("self_attention.linear_qkv", projections, (3 * width, width), qkv, bias=vision.qkv_bias),
        *_linear("self_attention.linear_proj", ("attention.projection_layer",), (width, width)),
        Row("attention_scale", ("lambda_1",), (width,)),
        *_norm("mlp.linear_fc1.layer_norm_", "layernorm_after", width, kind),
        *_linear("mlp.linear_fc1", ("mlp.fc1",), (inner, width)),
        *_linear("mlp.linear_fc2", ("mlp.fc2",), (width, inner)),
        Row("mlp_scale", ("lambda_2",), (width,)),
    ]


def _projector(architecture: Architecture) -> list[Row]:
    """The projector."""
    features, width = architecture.projector_input_size, architecture.language.hidden_size
    return [
        *_norm("norm.", "layer_norm", features, "LayerNorm"),
        *_linear("mlp.linear_fc1", ("linear_1",), (width, features)),
        *_linear("mlp.linear_fc2", ("linear_2",), (width, width)),
    ]


def _language_ends(language: Language) -> list[Row]:
    """What is below and above the layers of the language model."""
    width, tokens = language.hidden_size, language.vocab_size
    return [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (tokens, width), Vocabulary(tokens)),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), (width,)),
        Row("output_layer.weight", ("lm_head.weight",), (tokens, width), Vocabulary(tokens)),
    ]


def _language_layer(language: Language) -> list[Row]:
    """A layer of the language model."""
    width, inner = language.hidden_size, language.ffn_hidden_size
    heads, groups = language.num_attention_heads, language.num_query_groups
    head_size = width // heads
    qkv = GroupedQKV(heads, groups, head_size)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_rows = (heads + 2 * groups) * head_size
    return [
        *_norm("self_attention.linear_qkv.layer_norm_", "input_layernorm", width, "RMSNorm"),
        *_linear("self_attention.linear_qkv", projections, (qkv_rows, width), qkv, bias=language.qkv_bias),
        *_linear("self_attention.linear_proj", ("self_attn.o_proj",), (width, heads * head_size), bias=False),
        *_norm("mlp.linear_fc1.layer_norm_", "post_attention_layernorm", width, "RMSNorm"),
        *_linear("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), (2 * inner, width), Stacked(2), bias=False),
        *_linear("mlp.linear_fc2", ("mlp.down_proj",), (width, inner), bias=False),
    ]
