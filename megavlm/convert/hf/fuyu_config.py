"""Everything in a folder of ``FuyuForCausalLM`` but the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megavlm.config.connectors import Connector
from megavlm.config.schema import Architecture, Vision
from megavlm.config.vision import PIXELS, RESAMPLES
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import language_config, tokenizer_files
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import pixel_settings, write_generation
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.convert.weights.families import written_as
from megavlm.data.images.patches import FILL
from megavlm.data.images.tiling import FUYU_LIMIT
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, load_tokenizer

CLASS_NAME = "FuyuForCausalLM"
MODEL_TYPE = "fuyu"
_PROCESSOR = "FuyuProcessor"
# How an image is filled up to whole patches.
_FILLING: dict[str, Any] = {
    "do_pad": True,
    "padding_value": float(FILL),
    "padding_mode": "constant",
}


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``."""
    path = folder / FILE_NAME
    settings = shared.complete("FuyuConfig", raw, path)
    text = settings["text_config"]
    tied = settings["tie_word_embeddings"] or text.get("tie_word_embeddings")
    shared.refuse(path, list(_problems(settings)))
    mean, std = shared.normalisation(folder, PIXELS["siglip"])
    return Architecture(
        vision=Vision(
            num_layers=0,
            image_size=settings["patch_size"],
            patch_size=settings["patch_size"],
            pixel_mean=mean,
            pixel_std=std,
        ),
        connector=Connector(kind="linear", pixel_shuffle=1, norm=False),
        language=language_config.read(text, tied_head=bool(tied) and not has_head),
        image_tokens="fuyu",
    )


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield settings that our model does not support."""
    text = settings["text_config"]
    yield from shared.contradictions("", settings, {"num_channels": 3})
    if text.get("model_type") != "persimmon":
        yield f"text_config.model_type is {text.get('model_type')!r}, must be 'persimmon'"
        return
    yield from language_config.problems(text, "text_config")


def read_usage(folder: Path) -> Usage:
    """Read how a model is to be used: one question, and images of any size up to the limit of the
    image processor. Raises ValueError: the limit cannot be one.
    """
    found = shared.image_processor(folder)
    path = shared.image_processor_file(folder)
    shared.refuse(path, list(_other_images(found, folder)))
    size = found.get("size") or {}
    if not isinstance(size, dict):
        shared.refuse(path, [f"size is {size!r}, must be an object"])
    shared.refuse(path, list(shared.no_sizes("size", size, "width", "height")))
    width, height = FUYU_LIMIT
    limit = (size.get("width") or width, size.get("height") or height)
    return without_grid("fuyu", tiling="patches", image_limit=limit)


def _other_images(found: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yield settings by which an image processor makes other patches than those of ``folder``."""
    yield from shared.other_resizing(found, "bilinear")
    needed = dict(_FILLING)
    if found.get("patch_size") is not None:
        path = folder / FILE_NAME
        side = shared.complete("FuyuConfig", shared.read_config(path), path)["patch_size"]
        needed["patch_size"] = {"height": side, "width": side}
    for name, value in needed.items():
        if found.get(name) not in (None, value):
            yield f"{name} is {found[name]!r}, must be {value!r}"


def write(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    language = architecture.language
    text = language_config.write(language, written_as(language, "fuyu"), ids)
    return {
        "architectures": [CLASS_NAME],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "patch_size": architecture.vision.patch_size,
        "num_channels": 3,
        "image_token_id": ids.image,
        "tie_word_embeddings": language.tied_head,
        **ids.text,
        "text_config": text,
    }


def check_tokenizer(folder: Path) -> None:
    """See that ``FuyuProcessor`` reads images as training does: it takes off the first token of
    those that stand for them, a space in Fuyu's tokenizer.

    Raises:
        ValueError: another tokenizer puts nothing there.
    """
    images = IMAGE_TOKEN_SETS["fuyu"]
    begin = chat_format("fuyu").first_token
    tokenizer = load_tokenizer(folder)
    row = [images.context, images.newline, begin]
    found = tokenizer("".join(row), add_special_tokens=False)["input_ids"]
    if found[1:] != tokenizer.convert_tokens_to_ids(row):
        raise ValueError(
            f"--tokenizer {folder}: puts no space in front of a text that begins with"
            f" {images.context}, and FuyuProcessor would take the first token of an image for it;"
            f" use Fuyu's tokenizer, in which {images.context} and {images.newline} are ordinary"
            " pieces"
        )


def write_files(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and the class read it; arguments and
    errors as of ``processor.write_native``. There is no chat template: the processor itself puts
    prompts together, of a question and a line break.
    """
    check_tokenizer(tokenizer)
    ids = write_generation(folder, tokenizer, architecture, usage)
    write_json(folder / FILE_NAME, write(architecture, ids, dtype))
    tokenizer_files.write(tokenizer, folder, {"processor_class": _PROCESSOR})
    width, height = usage.image_limit
    side = architecture.vision.patch_size
    image_processor = {
        "image_processor_type": "FuyuImageProcessor",
        "processor_class": _PROCESSOR,
        **pixel_settings(architecture),
        "resample": RESAMPLES["bilinear"],
        "size": {"height": height, "width": width},
        "patch_size": {"height": side, "width": side},
        **_FILLING,
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)
    write_json(folder / PROCESSOR_NAME, {"processor_class": _PROCESSOR})
