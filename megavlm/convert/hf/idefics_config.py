"""Everything in a folder of ``IdeficsForVisionText2Text`` but the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.cross_attention import CrossAttention
from megavlm.config.resampler import Resampler
from megavlm.config.schema import Architecture
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision, language_config, tokenizer_files
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    read_json,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import GENERATION_NAME, pixel_settings, write_generation
from megavlm.convert.hf.token_ids import TextIds
from megavlm.convert.weights.families import FAMILIES
from megavlm.data.text.tokenizer import CHUNK_END, load_tokenizer

CLASS_NAME = "IdeficsForVisionText2Text"
MODEL_TYPE = "idefics"
_PROCESSOR = "IdeficsProcessor"
_FIXED: dict[str, dict[str, Any]] = {
    "": {"tie_word_embeddings": False, "use_resampler": True},
    "vision_config": {"num_channels": 3},
}
_RESAMPLER = (
    "resampler_n_latents",
    "resampler_depth",
    "resampler_n_heads",
    "resampler_head_dim",
)
_GATES = {"float": "scalar", "vector": "vector"}
_LLAMA = FAMILIES["llama"]


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    path = folder / FILE_NAME
    settings = shared.complete("IdeficsConfig", raw, path)
    # Its language model stands at the top of the file, without a name of its own.
    text = settings | {"model_type": _LLAMA.name}
    shared.refuse(path, list(_problems(settings, text)))
    vision = settings["vision_config"]
    perceiver = settings["perceiver_config"]
    added = settings["additional_vocab_size"]
    text["vocab_size"] += added
    return Architecture(
        vision=clip_vision.read(
            vision | {"hidden_size": vision["embed_dim"]},
            family="clip",
            pixels=shared.pixel_fields(folder, PIXELS["clip"], vision["image_size"]),
        ),
        connector=Connector(
            kind="resampler",
            resampler=Resampler(
                latents=perceiver["resampler_n_latents"],
                num_layers=perceiver["resampler_depth"],
                num_attention_heads=perceiver["resampler_n_heads"],
                head_size=perceiver["resampler_head_dim"],
                qk_norm=perceiver["qk_layer_norms_perceiver"],
            ),
        ),
        language=language_config.read(text, tied_head=False),
        cross_attention=CrossAttention(
            every=settings["cross_layer_interval"],
            gate=_GATES[settings["alpha_type"]],
            qk_norm=settings["qk_layer_norms"],
        ),
        added_tokens=added,
        image_tokens="openflamingo" if _ends_chunks(folder) else "idefics",
    )


def _ends_chunks(folder: Path) -> bool:
    """Tell whether the tokenizer of a folder has the token that ends a chunk."""
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens", ()) if path.is_file() else ()
    return any(token["content"] == CHUNK_END for token in added)


def _problems(settings: dict[str, Any], text: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    vision = settings["vision_config"]
    for section, fixed in _FIXED.items():
        yield from shared.contradictions(section, settings[section] if section else settings, fixed)
    yield from clip_vision.problems(vision, "vision_config")
    yield from shared.no_sizes("perceiver_config", settings["perceiver_config"], *_RESAMPLER)
    if settings["alpha_type"] not in _GATES:
        yield f"alpha_type is {settings['alpha_type']!r}, must be {' or '.join(_GATES)}"
    every = settings["cross_layer_interval"]
    if every < 1 or settings["num_hidden_layers"] % every:
        yield (
            f"cross_layer_interval is {every}, must divide num_hidden_layers"
            f" {settings['num_hidden_layers']}"
        )
    yield from language_config.problems(text, "")


def write(architecture: Architecture, ids: TextIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    vision = clip_vision.write(architecture.vision)
    width = vision.pop("hidden_size")
    crosses = architecture.cross_attention
    resampler = architecture.connector.resampler
    text = language_config.write(architecture.language, _LLAMA, ids)
    return text | {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        **_FIXED[""],
        "vocab_size": architecture.table_rows,
        "additional_vocab_size": architecture.added_tokens,
        "cross_layer_interval": crosses.every,
        "qk_layer_norms": crosses.qk_norm,
        "alpha_type": shared.name_of(crosses.gate, _GATES),
        "alpha_initializer": "zeros",
        "vision_config": {
            **_FIXED["vision_config"],
            **vision,
            "model_type": "idefics_vision",
            "embed_dim": width,
        },
        "perceiver_config": {
            "model_type": "idefics_perciever",
            "use_resampler": True,
            "resampler_n_latents": resampler.latents,
            "resampler_depth": resampler.num_layers,
            "resampler_n_heads": resampler.num_attention_heads,
            "resampler_head_dim": resampler.head_size,
            "qk_layer_norms_perceiver": resampler.qk_norm,
        },
    }


def read_usage(folder: Path) -> Usage:
    """Return how a model is to be used: images stretched to squares, one tile each."""
    template = "flamingo_chunks" if _ends_chunks(folder) else "flamingo"
    return without_grid(template, tiling="stretch")


def write_files(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and the class read it; arguments and
    errors as of ``processor.write_native``. There is no chat template: the processor takes texts
    and images in turn.
    """
    words = load_tokenizer(tokenizer)
    ids = write_generation(folder, tokenizer, architecture, usage)
    # The class refuses ids of added tokens here, such as that of the token which ends a chunk.
    rows = architecture.table_rows
    begin, end, pad = (
        token if token < rows else words.eos_token_id for token in (ids.begin, ids.end, ids.pad)
    )
    known = TextIds(begin=begin, end=end, pad=pad)
    write_json(folder / FILE_NAME, write(architecture, known, dtype))
    write_json(folder / GENERATION_NAME, replace(ids, pad=pad).text)
    entries = {"processor_class": _PROCESSOR}
    if words.pad_token is None:  # the processor fills up texts, even one alone
        entries["pad_token"] = words.unk_token or words.eos_token
    tokenizer_files.write(tokenizer, folder, entries)
    side = architecture.vision.image_size
    image_processor = {
        "image_processor_type": "IdeficsImageProcessor",
        "processor_class": _PROCESSOR,
        **pixel_settings(architecture),
        "size": {"height": side, "width": side},
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)
    write_json(folder / PROCESSOR_NAME, {"processor_class": _PROCESSOR})
