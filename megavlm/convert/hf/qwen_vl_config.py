"""config.json of the classes of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Published ones of the first two have the settings of the language model beside those of the whole,
transformers 5 writes them as a section of their own; both are read, and the second is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import language_config, qwen_vl_vision
from megavlm.convert.hf.qwen_vl_kinds import Kind
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import FAMILIES

_INTERLEAVED = "mrope_interleaved"


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None, kind: Kind) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    path = folder / shared.FILE_NAME
    settings = shared.complete(kind.form, raw, path)
    shared.refuse(path, list(_problems(settings, kind)))
    tied = settings["tie_word_embeddings"] and not has_head
    return Architecture(
        vision=qwen_vl_vision.read(settings["vision_config"], folder, kind),
        connector=Connector(kind="merger"),
        language=_read_language(settings["text_config"], kind, tied_head=tied),
        image_tokens="qwen2_vl",
    )


def _read_language(settings: Mapping[str, Any], kind: Kind, *, tied_head: bool) -> Language:
    """Read the language model."""
    found = language_config.read_bare(_as_alone(settings, kind), tied_head=tied_head)
    return replace(
        found, rotary_sections=_sections(settings, kind), rotary_interleaved=kind.is_third
    )


def _as_alone(settings: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """Return the settings of a language model as those of the one that it is but for its
    positions.
    """
    # The class of Qwen3-VL's experts normalises their weights, whatever config.json says.
    experts = {"norm_topk_prob": True} if FAMILIES[kind.language].has_experts else {}
    return {**settings, **experts, "model_type": kind.language}


def _sections(settings: Mapping[str, Any], kind: Kind) -> Any:
    """Return the sections of rotary positions, as a tuple if they are a list."""
    found = shared.rotary_settings(settings).get("mrope_section", kind.sections)
    return tuple(found) if isinstance(found, list) else found


def _problems(settings: dict[str, Any], kind: Kind) -> Iterator[str]:
    """Yield settings that our model does not support."""
    text = settings["text_config"]
    vision = settings["vision_config"]
    yield from qwen_vl_vision.problems(vision, kind)
    yield from language_config.problems(_as_alone(text, kind), "text_config")
    if vision.get(kind.output) != text.get("hidden_size"):
        yield (
            f"vision_config.{kind.output} is {vision.get(kind.output)}, must be that of the"
            f" language model, {text.get('hidden_size')}"
        )
    rotary = shared.rotary_settings(text)
    name = "text_config.rope_parameters"
    fixed = {"rope_type": "default", _INTERLEAVED: kind.is_third}
    yield from shared.contradictions(name, rotary, fixed)
    sections = _sections(text, kind)
    if (
        not isinstance(sections, tuple)
        or len(sections) != 3
        or not all(type(size) is int and size > 0 for size in sections)
    ):
        found = list(sections) if isinstance(sections, tuple) else sections
        yield f"{name}.mrope_section is {found!r}, must be three whole numbers of at least 1"


def write(
    kind: Kind,
    architecture: Architecture,
    marks: Mapping[str, int],
    ids: TokenIds,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Build the content of config.json.

    Args:
        kind: of the model.
        marks: ids of the tokens around images and of that for videos, by their names there.
        architecture, ids, dtype: as in ``native_config``.
    """
    return {
        "architectures": [kind.class_name],
        "model_type": kind.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": ids.image,
        **marks,
        "tie_word_embeddings": architecture.language.tied_head,
        "text_config": _write_language(architecture.language, kind, ids),
        "vision_config": qwen_vl_vision.write(architecture, kind),
    }


def _write_language(language: Language, kind: Kind, ids: TokenIds) -> dict[str, Any]:
    """Build the section of the language model."""
    found = language_config.write(language, FAMILIES[kind.language], ids)
    del found["architectures"]
    sections: dict[str, Any] = {"mrope_section": list(language.rotary_sections)}
    if kind.is_third:
        sections = {"rope_type": "default", **sections, _INTERLEAVED: True}
    else:
        sections = {"type": "mrope", **sections}
    return {
        **found,
        "model_type": f"{kind.model_type}_text",
        # transformers 4 reads the first, 5 the second.
        "rope_scaling": sections,
        "rope_parameters": {**found["rope_parameters"], **sections},
    }
