"""The table of weights: which tensor of megatron-core is which of Hugging Face's. It is read in
both directions.

A dialect is the names that one class gives to the weights; ``megavlm/convert/hf/hub_formats.py``
has the classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from megavlm.config.exports import HOLDS
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.convert.weights import idefics, pairs, qformer, resampler
from megavlm.convert.weights.connectors import (
    deep_merger_rows,
    linear_rows,
    llava_next_rows,
    llava_rows,
    merger_rows,
    mlp_rows,
)
from megavlm.convert.weights.families import (
    FAMILIES,
    clip,
    eva,
    family_of,
    internvit,
    qwen_vl,
    written_as,
)
from megavlm.convert.weights.mapping import Row, within

Dialect = Literal[
    "native",
    "chat",
    "llava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "fuyu",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "clip",
    "siglip",
    "internvl_c",
    "blip2",
    "blip2_retrieval",
    "instructblip",
    "idefics",
]


_LANGUAGE = "language_model."


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What a dialect calls the weights of the model.

    Args:
        vision: what the names of the vision encoder begin with.
        vision_rows: lists its weights.
        connector: what the names of the connector begin with.
        connector_rows: lists its weights.
        language: what the names of the language model begin with.
        language_rows: lists its weights; none: as its family has them.
        unused_rows: lists what files hold of the vision encoder beside the weights of the model.
        copies_tied_head: whether files hold a tied head as a tensor of its own.
    """

    vision: str
    vision_rows: Callable[[Vision], list[Row]]
    connector: str
    connector_rows: Callable[[Architecture], list[Row]]
    language: str = _LANGUAGE
    language_rows: Callable[[Architecture], list[Row]] | None = None
    unused_rows: Callable[[Vision], list[Row]] | None = None
    copies_tied_head: bool = False


_LLAVA_NEXT = _Names(
    vision="vision_tower.vision_model.",
    vision_rows=clip.rows,
    connector="",
    connector_rows=llava_next_rows,
    unused_rows=clip.unused_rows,
)
_QWEN_VL = _Names(
    vision="visual.",
    vision_rows=qwen_vl.rows,
    connector="visual.merger.",
    connector_rows=merger_rows,
    language="",
)


def _within_model(architecture: Architecture) -> list[Row]:
    """List the weights of a language model, with names as in a whole model that is one with its
    language model in memory.
    """
    language = architecture.language
    found = family_of(language).rows(language)
    return [
        replace(
            row, names=tuple(re.sub(r"^model\.", "model.language_model.", one) for one in row.names)
        )
        for row in found
    ]


_QWEN3_VL = _Names(
    vision="model.visual.",
    vision_rows=qwen_vl.rows,
    connector="model.visual.",
    connector_rows=deep_merger_rows,
    language="",
    language_rows=_within_model,
)
_NAMES: dict[Dialect, _Names] = {
    "native": _Names(
        vision="vision_tower.",
        vision_rows=partial(internvit.rows, names=internvit.NATIVE),
        connector="multi_modal_projector.",
        connector_rows=partial(mlp_rows, names=("layer_norm", "linear_1", "linear_2")),
    ),
    "chat": _Names(
        vision="vision_model.",
        vision_rows=partial(internvit.rows, names=internvit.CHAT),
        connector="mlp1.",
        connector_rows=partial(mlp_rows, names=("0", "1", "3")),
        copies_tied_head=True,
    ),
    "llava": _Names(
        vision="vision_tower.vision_model.",
        vision_rows=clip.rows,
        connector="multi_modal_projector.",
        connector_rows=llava_rows,
        unused_rows=clip.unused_rows,
    ),
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": _LLAVA_NEXT,
    "paligemma": _Names(
        vision="vision_tower.vision_model.",
        vision_rows=clip.rows,
        connector="multi_modal_projector.",
        connector_rows=partial(linear_rows, name="linear"),
    ),
    "fuyu": _Names(
        vision="",
        vision_rows=lambda vision: [],
        connector="",
        connector_rows=partial(linear_rows, name="vision_embed_tokens"),
    ),
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
    "blip2": _Names(
        vision="vision_model.",
        vision_rows=eva.rows,
        connector="",
        connector_rows=qformer.rows,
    ),
    "instructblip": _Names(
        vision="vision_model.",
        vision_rows=eva.rows,
        connector="",
        connector_rows=partial(qformer.rows, names=qformer.INSTRUCT_BLIP),
    ),
    "idefics": _Names(
        vision="model.vision_model.",
        vision_rows=clip.rows,
        connector="model.perceiver_resampler.",
        connector_rows=resampler.rows,
        language="",
        language_rows=idefics.rows,
        unused_rows=clip.unused_rows,
    ),
}
# Dialects of models without the usual three parts: every weight.
_WHOLE: dict[str, Callable[[Architecture], tuple[Row, ...]]] = {
    **pairs.ROWS,
    "blip2_retrieval": qformer.retrieval_rows,
}
_LLAVA_BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")
EMBEDDING_KEY = "language.embedding.word_embeddings.weight"
HEAD_KEY = "language.output_layer.weight"
# In memory transformers names weights so; files carry the names on the right, but some programs
# write the others.
_IN_MEMORY = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector|vision_embed_tokens)\."), r"\1."),
    (re.compile(r"^model\.image_newline$"), "image_newline"),
)


def name_on_disk(name: str) -> str:
    """Return the name that files give to a weight, also for a name that transformers uses in
    memory.
    """
    for pattern, replacement in _IN_MEMORY:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


def llava_name_on_disk(name: str) -> str | None:
    """Return the name that the files of published LLaVA and PaliGemma models give to a weight, also
    for a name that transformers 5 writes or uses in memory; None for a buffer of older versions.
    """
    if _LLAVA_BUFFER.search(name):
        return None
    found = name_on_disk(name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", found)


def qwen_vl_name_on_disk(name: str) -> str:
    """Return the name that files of Qwen2-VL and Qwen2.5-VL give to a weight, also for the one that
    transformers 5 uses in memory.
    """
    found = re.sub(r"^(model\.)?language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", found)


def rows(architecture: Architecture, dialect: Dialect = "native") -> tuple[Row, ...]:
    """Every weight of the model.

    Raises:
        ValueError: the language model is of no known family, or contradicts its family, or the
            dialect has no place for the vision encoder.
    """
    for reason in HOLDS[dialect](architecture):
        raise ValueError(f"{reason}; it stays in checkpoints")
    if dialect in _WHOLE:
        return _WHOLE[dialect](architecture)
    names = _NAMES[dialect]
    language = architecture.language
    language_rows = (
        names.language_rows(architecture)
        if names.language_rows
        else written_as(language, dialect).rows(language)
    )
    return (
        *within(names.vision_rows(architecture.vision), "vision.", names.vision),
        *within(names.connector_rows(architecture), "connector.", names.connector),
        *within(language_rows, "language.", names.language),
    )


def unused_rows(architecture: Architecture, dialect: Dialect) -> tuple[Row, ...]:
    """List what files of a dialect hold beside the weights of the model, with keys as in a folder
    of the vision encoder alone.
    """
    names = _NAMES.get(dialect)
    if names is None or names.unused_rows is None:
        return ()
    return tuple(within(names.unused_rows(architecture.vision), "", names.vision))


def copied_head(architecture: Architecture, dialect: Dialect) -> tuple[Row, ...]:
    """Return the row that writes a tied head as a tensor of its own, if the dialect needs it.

    ``InternVLChatModel`` of InternVL 2 and 3 unties every model, so a head that is not in the files
    would be random.
    """
    names = _NAMES.get(dialect)
    if names is None or not names.copies_tied_head or not architecture.language.tied_head:
        return ()
    untied = replace(architecture, language=replace(architecture.language, tied_head=False))
    by_key = {row.key: row for row in rows(untied, dialect)}
    return (replace(by_key[EMBEDDING_KEY], names=by_key[HEAD_KEY].names),)


def head_names() -> set[str]:
    """Collect the names of a head in files of all families."""
    language = (
        row
        for family in FAMILIES.values()
        for row in within(family.rows(Language(num_layers=1)), "language.", _LANGUAGE)
    )
    return {name for row in language if row.key == HEAD_KEY for name in row.names}
