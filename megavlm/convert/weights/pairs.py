"""The weights of models of pairs, an image encoder and a text encoder, as ``CLIPModel`` and
``SiglipModel`` of transformers name them, and OpenGVLab's ``InternVL_C``.

Shape letters: D hidden size, E size of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable

from megavlm.config.schema import Architecture
from megavlm.convert.weights.families import clip, internvit, written_as
from megavlm.convert.weights.mapping import Row, layers, linear, norm, within
from megavlm.convert.weights.transforms import Padded, Reshaped, Transposed


def _text_encoder(architecture: Architecture) -> list[Row]:
    """List the weights of the text encoder, without its prefixes."""
    language = architecture.language
    width = language.hidden_size
    tokens = language.vocab_size
    return [
        Row(
            "embedding.word_embeddings.weight",
            ("embeddings.token_embedding.weight",),
            (tokens, width),
            Padded(tokens),
        ),
        Row(
            "embedding.position_embeddings.weight",
            ("embeddings.position_embedding.weight",),
            (language.max_position_embeddings, width),
        ),
        *layers(
            clip.layer(language), "decoder.layers.{}.", "encoder.layers.{}.", language.num_layers
        ),
        *norm("decoder.final_layernorm.", "final_layer_norm", width, "LayerNorm"),
    ]


def _towers(architecture: Architecture) -> list[Row]:
    """List the weights of both encoders, with the norm behind the image encoder."""
    width = architecture.vision.hidden_size
    return [
        *within(clip.rows(architecture.vision), "vision.", "vision_model."),
        *norm("connector.norm.", "vision_model.post_layernorm", width, "LayerNorm"),
        *within(_text_encoder(architecture), "language.", "text_model."),
    ]


def clip_rows(architecture: Architecture) -> tuple[Row, ...]:
    """List every weight of a ``CLIPModel``."""
    size = architecture.contrastive.size
    image = (size, architecture.vision.hidden_size)
    text = (size, architecture.language.hidden_size)
    return (
        *_towers(architecture),
        Row("connector.projection.weight", ("visual_projection.weight",), image),
        Row("objective.text_projection.weight", ("text_projection.weight",), text),
        Row("objective.logit_scale", ("logit_scale",), (1,), Reshaped((), (1,))),
    )


def siglip_rows(architecture: Architecture) -> tuple[Row, ...]:
    """List every weight of a ``SiglipModel``."""
    text = (architecture.contrastive.size, architecture.language.hidden_size)
    return (
        *_towers(architecture),
        *within(clip.attention_pool(architecture.vision), "connector.", "vision_model."),
        *linear("objective.text_projection", ("text_model.head",), text),
        Row("objective.logit_scale", ("logit_scale",), (1,)),
        Row("objective.logit_bias", ("logit_bias",), (1,)),
    )


def internvl_c_rows(architecture: Architecture) -> tuple[Row, ...]:
    """List every weight of an InternVL-C: OpenGVLab's names of its InternViT, of its pool and of
    its projection, and those of the language model, which has no head.
    """
    vision = architecture.vision
    language = architecture.language
    width = vision.hidden_size
    size = architecture.contrastive.size
    pool = "clip_projector."
    of_language = [
        row
        for row in written_as(language, "internvl_c").rows(language)
        if row.key != "output_layer.weight"
    ]
    rows = [
        *within(internvit.rows(vision, internvit.CHAT), "vision.", "vision_model."),
        *within(of_language, "language.", "language_model."),
    ]
    for name in ("query", "key", "value"):
        short = name[0]
        rows += norm(f"connector.{name}_norm.", f"{pool}norm1_{short}", width, "LayerNorm")
        rows += linear(
            f"connector.{name}_proj", (f"{pool}cross_attn.{short}",), (width, width), bias=False
        )
        bias = f"{pool}cross_attn.{short}_bias"
        rows.append(Row(f"connector.{name}_proj.bias", (bias,), (width,)))
    text = (size, language.hidden_size)
    return (
        *rows,
        *linear("connector.projection", (f"{pool}cross_attn.proj",), (size, width)),
        Row("objective.text_projection.weight", ("text_projection",), text, Transposed()),
        Row("objective.logit_scale", ("logit_scale",), (1,), Reshaped((), (1,))),
    )


ROWS: dict[str, Callable[[Architecture], tuple[Row, ...]]] = {
    "clip": clip_rows,
    "siglip": siglip_rows,
    "internvl_c": internvl_c_rows,
}


def name_on_disk(name: str) -> str | None:
    """Return the name of a weight in files; None for a buffer that older versions wrote."""
    return None if name.endswith("embeddings.position_ids") else name
