"""The table of weights: which tensor of megatron-core is which of Hugging Face's. It is read in
both directions.

Two dialects are known: ``native``, the names of ``InternVLForConditionalGeneration`` of
transformers, and ``chat``, those of ``InternVLChatModel``, in which OpenGVLab publishes its models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megavlm.config.exports import HOLDS
from megavlm.config.schema import Architecture, Language
from megavlm.convert.weights.connectors import mlp_rows
from megavlm.convert.weights.families import FAMILIES, internvit, written_as
from megavlm.convert.weights.mapping import Row, within
from megavlm.convert.weights.transforms import Shape

Dialect = Literal["native", "chat"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


@dataclass(frozen=True, kw_only=True)
class _Names:
    """What a dialect calls the parts of the model, and the layers of the connector; and whether
    files hold a tied head as a tensor of its own.
    """

    vision: str
    vision_names: internvit.Names
    connector: str
    connector_layers: tuple[str, str, str]
    copies_tied_head: bool


_NAMES: dict[Dialect, _Names] = {
    "native": _Names(
        vision="vision_tower.",
        vision_names=internvit.NATIVE,
        connector="multi_modal_projector.",
        connector_layers=("layer_norm", "linear_1", "linear_2"),
        copies_tied_head=False,
    ),
    "chat": _Names(
        vision="vision_model.",
        vision_names=internvit.CHAT,
        connector="mlp1.",
        connector_layers=("0", "1", "3"),
        copies_tied_head=True,
    ),
}
_LANGUAGE = "language_model."
EMBEDDING_KEY = "language.embedding.word_embeddings.weight"
HEAD_KEY = "language.output_layer.weight"
# In memory transformers names weights so; files carry the names on the right, but some programs
# write the others.
_IN_MEMORY = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(vision_tower|multi_modal_projector)\."), r"\1."),
)


def name_on_disk(name: str) -> str:
    """Return the name that files give to a weight, also for a name that transformers uses in
    memory.
    """
    for pattern, replacement in _IN_MEMORY:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name


def rows(architecture: Architecture, dialect: Dialect = "native") -> tuple[Row, ...]:
    """Every weight of the model.

    Raises:
        ValueError: the language model is of no known family, or contradicts its family, or the
            dialect has no place for the vision encoder.
    """
    for reason in HOLDS[dialect](architecture):
        raise ValueError(f"{reason}; it stays in checkpoints")
    names = _NAMES[dialect]
    language = architecture.language
    return (
        *within(internvit.rows(architecture.vision, names.vision_names), "vision.", names.vision),
        *within(mlp_rows(architecture, names.connector_layers), "connector.", names.connector),
        *within(written_as(language, dialect).rows(language), "language.", _LANGUAGE),
    )


def copied_head(architecture: Architecture, dialect: Dialect) -> tuple[Row, ...]:
    """Return the row that writes a tied head as a tensor of its own, if the dialect needs it.

    ``InternVLChatModel`` of InternVL 2 and 3 unties every model, so a head that is not in the files
    would be random.
    """
    if not _NAMES[dialect].copies_tied_head or not architecture.language.tied_head:
        return ()
    untied = replace(architecture, language=replace(architecture.language, tied_head=False))
    head = next(row for row in rows(untied, dialect) if row.key == HEAD_KEY)
    embedding = next(row for row in rows(untied, dialect) if row.key == EMBEDDING_KEY)
    return (replace(embedding, names=head.names),)


def head_names() -> set[str]:
    """Collect the names of a head in files of both dialects and all families."""
    language = (
        row
        for family in FAMILIES.values()
        for row in within(family.rows(Language(num_layers=1)), "language.", _LANGUAGE)
    )
    return {name for row in language if row.key == HEAD_KEY for name in row.names}


def megatron_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shape of every whole tensor by megatron-core's key, without padding."""
    return {row.key: row.shape for row in rows(architecture)}
