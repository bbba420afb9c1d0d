"""The weights of connectors, and what Hugging Face's files call them."""

from __future__ import annotations

from megavlm.config.schema import Architecture
from megavlm.convert.weights.mapping import Row, layers, linear, norm, within
from megavlm.convert.weights.transforms import BesideIdentity


def mlp_rows(architecture: Architecture, names: tuple[str, str, str]) -> list[Row]:
    """List the weights of the connector ``mlp``; ``names`` are those of its norm (if it has one)
    and of its two linear layers.
    """
    features = architecture.connector_sizes.feature_size
    width = architecture.language.hidden_size
    bias = architecture.connector.bias
    first = norm("norm.", names[0], features, "LayerNorm") if architecture.connector.norm else []
    return [
        *first,
        *linear("mlp.linear_fc1", (names[1],), (width, features), bias=bias),
        *linear("mlp.linear_fc2", (names[2],), (width, width), bias=bias),
    ]


def linear_rows(architecture: Architecture, name: str) -> list[Row]:
    """List the weights of the connector ``linear``."""
    shape = (architecture.language.hidden_size, architecture.vision.output_size)
    return linear("linear", (name,), shape, bias=architecture.connector.bias)


def llava_rows(architecture: Architecture) -> list[Row]:
    """List the weights of LLaVA's connectors. ``LlavaForConditionalGeneration`` always has two
    linear layers: behind the one of the connector ``linear`` stands an identity.
    """
    names = ("linear_1", "linear_2")
    if architecture.connector.kind == "mlp":
        return mlp_rows(architecture, ("", *names))
    width = architecture.language.hidden_size
    shape = (width, architecture.vision.hidden_size)
    bias = architecture.connector.bias
    return linear("linear", names, shape, BesideIdentity(width), bias=bias)


def llava_next_rows(architecture: Architecture) -> list[Row]:
    """List the weights of LLaVA-NeXT's connectors: LLaVA's, and the embedding of the end of a row,
    which stands beside them in files.
    """
    newline = Row("newline", ("image_newline",), (architecture.language.hidden_size,))
    return [*within(llava_rows(architecture), "", "multi_modal_projector."), newline]


def merger_rows(architecture: Architecture) -> list[Row]:
    """List the weights of the connector ``merger``, as files of Qwen2-VL name them."""
    width = architecture.vision.hidden_size
    return _merger(architecture, width, ("ln_q", "mlp.0", "mlp.2"))


def deep_merger_rows(architecture: Architecture) -> list[Row]:
    """List the weights of the connector ``merger`` and of those for DeepStack, as files of Qwen3-VL
    name them.
    """
    names = ("norm", "linear_fc1", "linear_fc2")
    vision = architecture.vision
    joined = architecture.connector_sizes.feature_size
    return [
        *within(_merger(architecture, vision.hidden_size, names), "", "merger."),
        *layers(
            _merger(architecture, joined, names),
            "deep.{}.",
            "deepstack_merger_list.{}.",
            len(vision.deepstack_layers),
        ),
    ]


def _merger(architecture: Architecture, normed: int, names: tuple[str, str, str]) -> list[Row]:
    """List the weights of a merger whose norm is ``normed`` wide; ``names`` are those of its norm
    and of its two linear layers.
    """
    inner = architecture.connector_sizes.feature_size
    output = architecture.language.hidden_size
    return [
        *norm("norm.", names[0], normed, architecture.vision.normalization),
        *linear("mlp.linear_fc1", (names[1],), (inner, inner)),
        *linear("mlp.linear_fc2", (names[2],), (output, inner)),
    ]
