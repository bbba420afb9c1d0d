"""config.json of ``Qwen2VLForConditionalGeneration`` and of ``Qwen2_5_VLForConditionalGeneration``.

Published ones have the settings of the language model beside those of the whole, transformers 5
writes them as a section of their own; both are read, and the second is written. How fast positions
of frames grow (``tokens_per_second``) matters to videos alone and is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Language, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision, language_config
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import FAMILIES


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the two classes.

    Args:
        model_type: what config.json calls it, and the family of its vision encoder.
        class_name: of the model.
        form: class of its settings.
        processor: class of its processor.
        width: what the settings of the vision encoder call its hidden size.
        output: what they call the width of its features.
    """

    model_type: str
    class_name: str
    form: str
    processor: str
    width: str
    output: str

    @property
    def is_2_5(self) -> bool:
        """Whether it is Qwen2.5-VL: windows, RMSNorm, an MLP with a gate."""
        return self is QWEN2_5_VL


QWEN2_VL = Kind(
    model_type="qwen2_vl",
    class_name="Qwen2VLForConditionalGeneration",
    form="Qwen2VLConfig",
    processor="Qwen2VLProcessor",
    width="embed_dim",
    output="hidden_size",
)
QWEN2_5_VL = Kind(
    model_type="qwen2_5_vl",
    class_name="Qwen2_5_VLForConditionalGeneration",
    form="Qwen2_5_VLConfig",
    processor="Qwen2_5_VLProcessor",
    width="hidden_size",
    output="out_hidden_size",
)
KINDS = {kind.model_type: kind for kind in (QWEN2_VL, QWEN2_5_VL)}
# Of published models; of videos, which no model here reads.
_TOKENS_PER_SECOND = 2
# Of the class, if config.json does not say.
_SECTIONS = (16, 24, 24)
# The classes state both in their code.
_EPSILON = 1e-6
_VISION_ROTATION = {"rope_type": "axial", "rope_theta": 1e4}


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None, kind: Kind) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    path = folder / shared.FILE_NAME
    settings = shared.complete(kind.form, raw, path)
    shared.refuse(path, list(_problems(settings, kind)))
    tied = settings["tie_word_embeddings"] and not has_head
    return Architecture(
        vision=read_vision(settings["vision_config"], folder, kind),
        connector=Connector(kind="merger"),
        language=_read_language(settings["text_config"], tied_head=tied),
        image_tokens="qwen2_vl",
    )


def read_vision(settings: Mapping[str, Any], folder: Path, kind: Kind) -> Vision:
    """Read the vision encoder.

    Args:
        settings: its section of config.json, without problems.
        folder: of the model.
        kind: of the model.
    """
    return Vision(
        family=kind.model_type,
        image_size=settings["patch_size"] * settings["spatial_merge_size"],
        patch_size=settings["patch_size"],
        temporal_patch_size=settings["temporal_patch_size"],
        num_layers=settings["depth"],
        hidden_size=settings[kind.width],
        num_attention_heads=settings["num_heads"],
        layernorm_epsilon=_EPSILON,
        **(_fields_of_2_5(settings) if kind.is_2_5 else _fields_of_2(settings)),
        **shared.pixel_fields(folder, PIXELS["clip"]),
    )


def _fields_of_2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Vision`` in which Qwen2-VL's encoder differs from Qwen2.5-VL's."""
    return dict(
        ffn_hidden_size=settings["embed_dim"] * settings["mlp_ratio"],
        activation=clip_vision.ACTIVATIONS[settings["hidden_act"]],
    )


def _fields_of_2_5(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``Vision`` in which Qwen2.5-VL's encoder differs from Qwen2-VL's."""
    return dict(
        ffn_hidden_size=settings["intermediate_size"],
        activation="swiglu",
        normalization="RMSNorm",
        window_size=settings["window_size"],
        full_attention_layers=tuple(settings["fullatt_block_indexes"]),
    )


def _read_language(settings: Mapping[str, Any], *, tied_head: bool) -> Language:
    """Read the language model."""
    found = language_config.read_bare(_as_qwen2(settings), tied_head=tied_head)
    return replace(found, rotary_sections=_sections(settings))


def _as_qwen2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a language model as those of a Qwen2, which it is but for its
    positions.
    """
    return {**settings, "model_type": "qwen2"}


def _sections(settings: Mapping[str, Any]) -> Any:
    """Return the sections of rotary positions, as a tuple if they are a list."""
    found = shared.rotary_settings(settings).get("mrope_section", _SECTIONS)
    return tuple(found) if isinstance(found, list) else found


def _problems(settings: dict[str, Any], kind: Kind) -> Iterator[str]:
    """Yield settings that our model does not support."""
    text = settings["text_config"]
    vision = settings["vision_config"]
    yield from vision_problems(vision, kind)
    yield from language_config.problems(_as_qwen2(text), "text_config")
    if vision.get(kind.output) != text.get("hidden_size"):
        yield (
            f"vision_config.{kind.output} is {vision.get(kind.output)}, must be that of the"
            f" language model, {text.get('hidden_size')}"
        )
    rotary = shared.rotary_settings(text)
    name = "text_config.rope_parameters"
    yield from shared.contradictions(name, rotary, {"rope_type": "default"})
    sections = _sections(text)
    if (
        not isinstance(sections, tuple)
        or len(sections) != 3
        or not all(type(size) is int and size > 0 for size in sections)
    ):
        found = list(sections) if isinstance(sections, tuple) else sections
        yield f"{name}.mrope_section is {found!r}, must be three whole numbers of at least 1"


def vision_problems(settings: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    """Yield settings of a vision encoder that our model does not support."""
    section = "vision_config"
    sizes = ["depth", kind.width, "num_heads", "patch_size", "temporal_patch_size"]
    sizes += ["spatial_merge_size", kind.output]
    sizes += ["intermediate_size", "window_size"] if kind.is_2_5 else ["mlp_ratio"]
    wrong = list(shared.needed_sizes(section, settings, *sizes))
    yield from wrong
    if wrong:
        return
    yield from shared.contradictions(section, settings, {"in_channels": 3})
    rotation = shared.rotary_settings(settings)
    yield from shared.contradictions(f"{section}.rope_parameters", rotation, _VISION_ROTATION)
    known = ("silu",) if kind.is_2_5 else tuple(clip_vision.ACTIVATIONS)
    if settings["hidden_act"] not in known:
        yield (
            f"{section}.hidden_act is {settings['hidden_act']!r}, must be one of {', '.join(known)}"
        )
    heads = settings["num_heads"]
    if settings[kind.width] % (4 * heads):
        yield (
            f"{section}.{kind.width} is {settings[kind.width]}, must be a multiple of 4 num_heads"
            f" = {4 * heads}: half of a head is rotated by rows, half by columns"
        )
    if kind.is_2_5:
        yield from _window_problems(settings, section)


def _window_problems(settings: Mapping[str, Any], section: str) -> Iterator[str]:
    """Yield settings of windows that cannot be."""
    tile = settings["patch_size"] * settings["spatial_merge_size"]
    if settings["window_size"] < tile:
        yield f"{section}.window_size is {settings['window_size']}, must be at least a tile, {tile}"
    layers = settings["fullatt_block_indexes"]
    if not isinstance(layers, list | tuple) or not all(type(one) is int for one in layers):
        yield f"{section}.fullatt_block_indexes is {layers!r}, must be a list of whole numbers"


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
        "vision_config": _write_vision(architecture, kind),
    }


def _write_language(language: Language, kind: Kind, ids: TokenIds) -> dict[str, Any]:
    """Build the section of the language model."""
    found = language_config.write(language, FAMILIES["qwen2"], ids)
    del found["architectures"]
    sections = {"type": "mrope", "mrope_section": list(language.rotary_sections)}
    return {
        **found,
        "model_type": f"{kind.model_type}_text",
        # transformers 4 reads the first, 5 the second.
        "rope_scaling": sections,
        "rope_parameters": {**found["rope_parameters"], **sections},
    }


def _write_vision(architecture: Architecture, kind: Kind) -> dict[str, Any]:
    """Build the section of the vision encoder."""
    vision = architecture.vision
    return {
        "model_type": f"{kind.model_type}_vision",
        "depth": vision.num_layers,
        kind.width: vision.hidden_size,
        "num_heads": vision.num_attention_heads,
        "in_channels": 3,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.grid,
        "temporal_patch_size": vision.temporal_patch_size,
        kind.output: architecture.language.hidden_size,
        **(_settings_of_2_5(vision) if kind.is_2_5 else _settings_of_2(vision)),
    }


def _settings_of_2(vision: Vision) -> dict[str, Any]:
    """Return what ``_fields_of_2`` reads."""
    return {
        "mlp_ratio": vision.ffn_hidden_size // vision.hidden_size,
        "hidden_act": clip_vision.activation_name(vision.activation),
    }


def _settings_of_2_5(vision: Vision) -> dict[str, Any]:
    """Return what ``_fields_of_2_5`` reads, and what matters to videos."""
    return {
        "intermediate_size": vision.ffn_hidden_size,
        "hidden_act": "silu",
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.full_attention_layers),
        "tokens_per_second": _TOKENS_PER_SECOND,
    }
