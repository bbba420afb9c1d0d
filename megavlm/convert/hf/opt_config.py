"""The settings of an OPT, from and to its part of config.json, whose names differ from those of all
other families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megavlm.config.schema import Language
from megavlm.convert.hf.json_files import contradictions, needed_sizes
from megavlm.convert.weights.families import opt

_NEEDED = (
    "num_hidden_layers",
    "hidden_size",
    "ffn_dim",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def problems(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield why an OPT cannot be trained here; arguments as of ``language_config.problems``."""
    yield from needed_sizes(section, settings, *_NEEDED)
    yield from contradictions(section, settings, opt.FAMILY.settings)
    size = settings.get("word_embed_proj_dim")
    width = settings.get("hidden_size")
    if size not in (None, width):
        yield (
            f"{section}.word_embed_proj_dim is {size}, must be hidden_size {width}: embeddings that"
            " are projected, as in OPT-350M, do not exist here"
        ).lstrip(".")


def read(settings: Mapping[str, Any], *, tied_head: bool) -> Language:
    """Read an OPT; arguments as of ``language_config.read``."""
    heads = settings["num_attention_heads"]
    return Language(
        family="opt",
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["ffn_dim"],
        num_attention_heads=heads,
        num_query_groups=heads,
        vocab_size=settings["vocab_size"],
        max_position_embeddings=settings["max_position_embeddings"],
        tied_head=tied_head,
        **opt.FAMILY.facts,
    )


def write(language: Language) -> dict[str, Any]:
    """Return the sizes in an OPT's part of config.json."""
    return {
        "num_hidden_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "word_embed_proj_dim": language.hidden_size,
        "ffn_dim": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "vocab_size": language.vocab_size,
        "max_position_embeddings": language.max_position_embeddings,
    }
