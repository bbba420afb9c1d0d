"""Folders of ``CLIPModel`` and ``SiglipModel``: config.json, tokenizer, image processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Contrastive, Language, Vision
from megavlm.config.vision import PIXELS
from megavlm.convert.hf import clip_vision, json_files, one_tile, tokenizer_files
from megavlm.convert.hf.json_files import FILE_NAME, IMAGE_PROCESSOR_NAME, write_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.processor import tile_processor
from megavlm.data.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_OLD_END = 2


def read_clip(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture of a ``CLIPModel``; see ``native_config.read``."""
    found = json_files.complete("CLIPConfig", raw, folder / FILE_NAME)
    text = found["text_config"]
    wrong = [
        *_problems(found),
        *json_files.needed_sizes("", found, "projection_dim"),
        *json_files.contradictions("text_config", text, json_files.CAUSAL),
        *_no_end(text),
    ]
    json_files.refuse(folder / FILE_NAME, wrong)
    return Architecture(
        objective="contrastive",
        vision=_vision("clip", found["vision_config"], folder),
        connector=Connector(kind="class_token"),
        language=_language("clip_text", text),
        contrastive=Contrastive(size=found["projection_dim"]),
    )


def read_siglip(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture of a ``SiglipModel``; see ``native_config.read``."""
    found = json_files.complete("SiglipConfig", raw, folder / FILE_NAME)
    text = found["text_config"]
    size = text.get("projection_size") or text["hidden_size"]
    wrong = [*_problems(found), *json_files.no_sizes("text_config", text, "projection_size")]
    if not found["vision_config"].get("vision_use_head", True):
        wrong.append("vision_config.vision_use_head is False, must be True")
    json_files.refuse(folder / FILE_NAME, wrong)
    return Architecture(
        objective="contrastive",
        vision=_vision("siglip", found["vision_config"], folder),
        connector=Connector(kind="attention"),
        language=_language("siglip_text", text),
        contrastive=Contrastive(size=size, loss="sigmoid", text_bias=True, max_scale=0.0),
    )


def _problems(found: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    for section in ("vision_config", "text_config"):
        yield from clip_vision.problems(found[section], section)
    yield from json_files.contradictions(
        "vision_config", found["vision_config"], {"num_channels": 3}
    )


def _no_end(text: dict[str, Any]) -> Iterator[str]:
    """Yield that no token ends a text: a ``CLIPModel`` would take the embedding of its first."""
    end = text.get("eos_token_id")
    if type(end) is not int or not 0 <= end < text["vocab_size"]:
        yield (
            f"text_config.eos_token_id is {end!r}, must be a token of text_config.vocab_size"
            f" {text['vocab_size']}: the embedding of a text is that of its end"
        )


def _vision(family: str, found: dict[str, Any], folder: Path) -> Vision:
    pixels = json_files.pixel_fields(folder, PIXELS[family], found["image_size"])
    return clip_vision.read(found, family=family, pixels=pixels)


def _language(family: str, found: dict[str, Any]) -> Language:
    return Language(
        family=family,
        num_query_groups=found["num_attention_heads"],
        vocab_size=found["vocab_size"],
        max_position_embeddings=found["max_position_embeddings"],
        num_layers=found["num_hidden_layers"],
        hidden_size=found["hidden_size"],
        ffn_hidden_size=found["intermediate_size"],
        num_attention_heads=found["num_attention_heads"],
        layernorm_epsilon=found["layer_norm_eps"],
        activation=clip_vision.ACTIVATIONS[found["hidden_act"]],
    )


def usage_of_clip(folder: Path) -> Usage:
    """Return how a ``CLIPModel`` sees pairs: the square in the middle of an image, or as its image
    processor says.
    """
    tiling = one_tile.read_tiling(folder, "CLIPImageProcessor")
    return Usage(template="clip", system_message="", max_tiles=1, tiling=tiling)


def usage_of_siglip(folder: Path) -> Usage:
    """Return how a ``SiglipModel`` sees pairs: images stretched to squares, or as its image
    processor says.
    """
    tiling = one_tile.read_tiling(folder, "SiglipImageProcessor")
    return Usage(template="siglip", system_message="", max_tiles=1, tiling=tiling)


def write_clip(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights of a ``CLIPModel``; see ``processor.write_native``."""
    ids = check_clip_tokenizer(tokenizer)
    config = json_files.class_of_transformers("CLIPConfig")(
        text_config=_written_text(architecture.language) | ids,
        vision_config=clip_vision.write(architecture.vision),
        projection_dim=architecture.contrastive.size,
        architectures=["CLIPModel"],
    )
    processor = tile_processor(architecture, usage, "CLIPImageProcessor") | {
        "do_convert_rgb": True,
        "processor_class": "CLIPProcessor",
    }
    _write(folder, tokenizer, config, dtype, processor)


def write_siglip(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights of a ``SiglipModel``; see ``processor.write_native``."""
    text = _written_text(architecture.language) | _token_ids(tokenizer)
    config = json_files.class_of_transformers("SiglipConfig")(
        text_config=text | {"projection_size": architecture.contrastive.size},
        vision_config=clip_vision.write(architecture.vision),
        architectures=["SiglipModel"],
    )
    processor = tile_processor(architecture, usage, "SiglipImageProcessor") | {
        "processor_class": "SiglipProcessor",
    }
    _write(folder, tokenizer, config, dtype, processor)


def _written_text(language: Language) -> dict[str, Any]:
    """Return the settings of the encoder of texts."""
    return dict(
        num_hidden_layers=language.num_layers,
        hidden_size=language.hidden_size,
        intermediate_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        layer_norm_eps=language.layernorm_epsilon,
        hidden_act=clip_vision.activation_name(language.activation),
        vocab_size=language.vocab_size,
        max_position_embeddings=language.max_position_embeddings,
    )


def _token_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the tokenizer's tokens that config.json names; a ``CLIPModel`` takes the
    embedding of a text where its end token stands.
    """
    tokenizer = load_tokenizer(folder)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if ids["eos_token_id"] is None:
        raise ValueError(f"--tokenizer {folder}: has no eos_token, which ends a text")
    return {name: number for name, number in ids.items() if number is not None}


def end_problems(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield that a ``CLIPModel`` takes the embedding of a text elsewhere than at the end that the
    tokenizer gives it. For old folders, whose id is 2, that is the token with the highest id.
    """
    end = settings["text_config"]["eos_token_id"]
    taken = max(tokenizer.get_vocab().values()) if end == _OLD_END else end
    if tokenizer.eos_token_id not in (None, taken):
        old = f", which means the highest id, {taken}" if end == _OLD_END else ""
        yield (
            f"text_config.eos_token_id is {end}{old}, and the tokenizer's {tokenizer.eos_token} is"
            f" {tokenizer.eos_token_id}"
        )


def check_clip_tokenizer(folder: Path) -> dict[str, int]:
    """Return the ids that config.json names.

    Raises:
        ValueError: a ``CLIPModel`` would take the embedding of a text at another token than its
            last one, which training takes.
    """
    ids = _token_ids(folder)
    if ids["eos_token_id"] == _OLD_END:
        raise ValueError(
            f"--tokenizer {folder}: its eos_token has the id {_OLD_END}, by which transformers"
            " knows old CLIPs, whose texts it ends at the token with the highest id; train with a"
            " tokenizer that gives it another id"
        )
    if load_tokenizer(folder)("a")["input_ids"][-1] != ids["eos_token_id"]:
        raise ValueError(
            f"--tokenizer {folder}: does not end a text with its eos_token, where a CLIPModel takes"
            " the embedding of the text; pack with a tokenizer that does"
        )
    return ids


def _write(
    folder: Path,
    tokenizer: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    processor: dict[str, Any],
) -> None:
    """Write the files."""
    settings = config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / FILE_NAME, settings)
    write_json(folder / IMAGE_PROCESSOR_NAME, processor)
    tokenizer_files.copy(tokenizer, folder)
