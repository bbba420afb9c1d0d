"""Everything in a folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL but the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.config.vision import RESAMPLES
from megavlm.convert.hf import json_files as shared
from megavlm.convert.hf import qwen_vl_config, qwen_vl_videos, tokenizer_files
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage, without_grid
from megavlm.convert.hf.processor import chat_template, write_generation
from megavlm.convert.hf.qwen_vl_kinds import Kind
from megavlm.data.text.tokenizer import IMAGE_TOKEN_SETS, QWEN_VIDEO, load_tokenizer


def read_usage(folder: Path, *, kind: Kind) -> Usage:
    """Read how a model is to be used: its conversations, and images of any size between the bounds
    of the image processor, frames of videos between those of the video processor. Raises
    ValueError: it makes other images than training does.
    """
    found = shared.image_processor(folder)
    path = shared.image_processor_file(folder)
    size = found.get("size") or {}
    if not isinstance(size, Mapping):
        shared.refuse(path, [f"size is {size!r}, must be an object"])
    names = [name for pair in qwen_vl_videos.BOUNDS for name in pair]
    wrong = [*shared.no_sizes("size", size, *names), *shared.no_sizes("", found, *names)]
    config = folder / FILE_NAME
    vision = shared.complete(kind.form, shared.read_config(config), config)["vision_config"]
    shared.refuse(path, [*wrong, *_other_images(found, vision)])
    least, most = (
        found.get(old) or size.get(new) or size.get(old) or usual
        for (new, old), usual in zip(qwen_vl_videos.BOUNDS, kind.bounds, strict=True)
    )
    if least > most:
        shared.refuse(path, [f"an image has at least {least} pixels and at most {most}"])
    video = qwen_vl_videos.read(folder, vision["patch_size"] * vision["spatial_merge_size"], kind)
    bounds = dict(min_pixels=least, max_pixels=most, video=video)
    return without_grid(kind.template, tiling="native", **bounds)


def _other_images(found: Mapping[str, Any], vision: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings by which an image processor makes other tiles than a model reads; ``vision``
    are those of its vision encoder.
    """
    yield from shared.other_resizing(found, *RESAMPLES)
    for name, of_model in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    ):
        if found.get(name) not in (None, vision[of_model]):
            yield f"{name} is {found[name]!r}, must be {vision[of_model]}, as in {FILE_NAME}"


def write(
    folder: Path,
    tokenizer: Path,
    architecture: Architecture,
    usage: Usage,
    dtype: torch.dtype,
    *,
    kind: Kind,
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and the class read it; arguments and
    errors as of ``processor.write_native``.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    marks = _marks(tokenizer, architecture)
    settings = qwen_vl_config.write(kind, architecture, marks, ids, dtype)
    write_json(folder / FILE_NAME, settings)
    tokenizer_files.write(tokenizer, folder, {"processor_class": kind.processor})
    context = IMAGE_TOKEN_SETS[architecture.image_tokens].context
    template = chat_template(tokenizer, usage, with_images=True, image=context)
    if template is not None:
        (folder / tokenizer_files.TEMPLATE_NAME).write_text(template, encoding="utf-8")
    bounds = (usage.min_pixels, usage.max_pixels)
    named = list(zip(qwen_vl_videos.BOUNDS, bounds, strict=True))
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        **qwen_vl_videos.patch_settings(architecture, kind),
        "size": {new: bound for (new, _), bound in named},
        # Releases of transformers 4 before 4.54 read these.
        **{old: bound for (_, old), bound in named},
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)
    qwen_vl_videos.write(folder, architecture, usage.video, kind)
    write_json(folder / PROCESSOR_NAME, {"processor_class": kind.processor})


def _marks(tokenizer: Path, architecture: Architecture) -> dict[str, int]:
    """Return the ids of the tokens around images and of that for videos."""
    known = load_tokenizer(tokenizer).get_vocab()
    images = IMAGE_TOKEN_SETS[architecture.image_tokens]
    return {
        "video_token_id": known[QWEN_VIDEO],
        "vision_start_token_id": known[images.start],
        "vision_end_token_id": known[images.end],
    }
