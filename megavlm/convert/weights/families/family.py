"""What a family of language models is: a table of weights, and the facts that its config.json
states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megavlm.config.schema import Language
from megavlm.convert.weights.mapping import Row, layers, norm
from megavlm.convert.weights.transforms import Padded

_USUAL_FACTS = {
    "activation": "swiglu",
    "zero_centered_norm": False,
    "scaled_embedding": False,
    "rotary_percent": 1.0,
    "rotary_yarn_factor": 1.0,
    "linear_bias": False,
    "attention_sinks": False,
    "window_attn_skip_freq": 0,
    "attention_softcap": 0.0,
    "final_softcap": 0.0,
    "query_pre_attn_scalar": 0,
    "sandwich_norm": False,
}
_USUAL_EXPERT_NAMES = {
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
}
_USUAL_SETTINGS = {"hidden_act": "silu"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of language models.

    Args:
        name: value of ``--architecture.language.family``, and ``model_type`` in config.json.
        class_name: of the causal language model, ``architectures`` in config.json.
        rows: table of a model, with keys and names as in a folder that holds the language model
            alone.
        facts: fields of ``Language`` that have one value in all models of the family; fields that
            few families differ in have the usual values.
        settings: what config.json says accordingly; where it says something else, our model would
            compute something else.
        accepted: other values of settings that mean the same.
        has_head_dim: whether config.json states the width of a head; otherwise it is hidden_size /
            num_attention_heads.
        has_groups: whether config.json states the number of key and value heads; otherwise each
            query head has its own.
        has_experts: whether the MLP of every layer is a mixture of experts.
        expert_names: what config.json calls fields of ``Language`` about experts.
        counts_shared: whether it says of the shared expert how many times as wide as an expert it
            is, instead of its width.
        norm_epsilon: what config.json calls the epsilon of the norms.
        stated: what config.json calls further fields of ``Language``, in which models of the family
            differ and others have the usual value; null there is 0.
        native: family whose names and settings are used inside classes of transformers; empty: this
            one.
        chat: the same for ``InternVLChatModel``.
    """

    name: str
    class_name: str
    rows: Callable[[Language], list[Row]]
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    has_head_dim: bool = True
    has_groups: bool = True
    has_experts: bool = False
    expert_names: Mapping[str, str] = field(default_factory=dict)
    counts_shared: bool = False
    norm_epsilon: str = "rms_norm_eps"
    stated: Mapping[str, str] = field(default_factory=dict)
    native: str = ""
    chat: str = ""

    def __post_init__(self) -> None:
        facts = _USUAL_FACTS | dict(self.facts)
        facts = {name: value for name, value in facts.items() if name not in self.stated}
        object.__setattr__(self, "facts", facts)
        names = _USUAL_EXPERT_NAMES | dict(self.expert_names) if self.has_experts else {}
        object.__setattr__(self, "expert_names", names)
        object.__setattr__(self, "settings", _USUAL_SETTINGS | dict(self.settings))

    @property
    def has_shared_expert(self) -> bool:
        """Whether every token takes another gated MLP beside its experts."""
        return "shared_expert_ffn_hidden_size" in self.expert_names


def decoder(
    language: Language,
    layer: list[Row],
    *,
    start: str = "model.",
    embedding: str = "embed_tokens",
    last_norm: str = "norm",
    head: str = "lm_head",
) -> list[Row]:
    """Build the table of a language model from that of a layer.

    Args:
        language: sizes of the model.
        layer: rows of a layer, without prefixes.
        start: what all names but that of the head begin with.
        embedding: name of the token embedding.
        last_norm: name of the norm behind the last layer.
        head: name of the head, if it is not the embedding.
    """
    kind = "LayerNorm" if language.has_layer_norm else "RMSNorm"
    width = language.hidden_size
    tokens = language.vocab_size
    rows = [
        Row(
            "embedding.word_embeddings.weight",
            (f"{start}{embedding}.weight",),
            (tokens, width),
            Padded(tokens),
        ),
        *layers(layer, "decoder.layers.{}.", f"{start}layers.{{}}.", language.num_layers),
        *norm("decoder.final_layernorm.", f"{start}{last_norm}", width, kind),
    ]
    if not language.tied_head:
        rows.append(
            Row("output_layer.weight", (f"{head}.weight",), (tokens, width), Padded(tokens))
        )
    return rows
