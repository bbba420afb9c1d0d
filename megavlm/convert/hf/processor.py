"""Everything in a Hugging Face folder but the weights: config.json, tokenizer, chat template, image
processor, generation settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.config.tiling import BOUNDED
from megavlm.config.vision import RESAMPLES
from megavlm.convert.hf import chat_config, native_config, tokenizer_files
from megavlm.convert.hf.json_files import (
    FILE_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    read_json,
    write_json,
)
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.token_ids import TokenIds, token_ids
from megavlm.data.text.templates import FORMATS
from megavlm.data.text.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    QWEN_VIDEO,
    first_tokens,
    load_tokenizer,
    video_token,
)

# The processor wants a token for videos that texts do not hold. Qwen2.5's tokenizers have one.
# Elsewhere it is one of InternVL's that nothing uses, since a new token would make another
# tokenizer than the one that the model was trained with.
_UNUSED = "<quad>"
_PROCESSOR = "InternVLProcessor"
GENERATION_NAME = "generation_config.json"


def write_native(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and ``InternVLForConditionalGeneration``
    read it.

    Args:
        folder: the folder of the model.
        tokenizer: folder of the tokenizer.
        architecture: the model.
        usage: its template and its tile limits.
        dtype: dtype of the weights.

    Raises:
        ValueError: tokenizer and model do not fit, or the class has no such model.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    template = chat_template(tokenizer, usage, with_images=True)
    if template is None:
        raise ValueError(
            f"--dialect native: the model's template {usage.template!r} is not one of"
            f" {', '.join(FORMATS)}, and its tokenizer has no chat template with images; use chat"
        )
    write_json(folder / FILE_NAME, native_config.write(architecture, ids, dtype))
    tokenizer_files.write(tokenizer, folder, _processor_tokens(tokenizer))
    (folder / tokenizer_files.TEMPLATE_NAME).write_text(template, encoding="utf-8")
    write_json(folder / IMAGE_PROCESSOR_NAME, _image_processor(architecture, usage))
    write_json(folder / VIDEO_PROCESSOR_NAME, _video_processor(architecture))
    write_json(
        folder / PROCESSOR_NAME,
        {"processor_class": _PROCESSOR, "image_seq_length": architecture.placeholders_per_tile},
    )


def write_chat(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as OpenGVLab's ``InternVLChatModel`` and the programs that load
    it read it; arguments and errors as of ``write_native``.
    """
    ids = write_generation(folder, tokenizer, architecture, usage)
    write_json(folder / FILE_NAME, chat_config.write(architecture, ids, dtype, usage))
    # transformers before 4.43 reads the template from tokenizer_config.json alone.
    template = chat_template(tokenizer, usage, with_images=False)
    tokenizer_files.write(tokenizer, folder, {"chat_template": template} if template else {})
    side = architecture.vision.image_size
    vision = architecture.vision
    image_processor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": side,
        "do_center_crop": True,
        "crop_size": side,
        "resample": RESAMPLES["bicubic"],
        "do_normalize": True,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)


def write_generation(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage
) -> TokenIds:
    """Write the settings of ``generate``, and return the tokens that they name."""
    ids = token_ids(tokenizer, architecture, usage.template)
    write_json(folder / GENERATION_NAME, ids.text)
    return ids


def chat_template(
    tokenizer: Path, usage: Usage, *, with_images: bool, image: str = IMAGE_CONTEXT
) -> str | None:
    """Return the chat template: that of the packs' conversation template, unless the model was not
    trained here and its tokenizer has one (that knows images, if it must); None if neither exists.
    """
    own = tokenizer / tokenizer_files.TEMPLATE_NAME
    found = (
        own.read_text(encoding="utf-8")
        if own.is_file()
        else _tokenizer_settings(tokenizer).get("chat_template")
    )
    keeps = isinstance(found, str) and not usage.is_trained and (image in found or not with_images)
    if keeps:
        return found
    if usage.template not in FORMATS:
        return None
    words = load_tokenizer(tokenizer)
    return FORMATS[usage.template].hf_template(
        system_message=usage.system_message,
        bos=bool(first_tokens(words)),
        video={BOUNDED: video_token(words), "native": QWEN_VIDEO}.get(usage.tiling),
    )


def _tokenizer_settings(tokenizer: Path) -> dict[str, Any]:
    """Return what ``tokenizer_config.json`` says."""
    path = tokenizer / tokenizer_files.SETTINGS_NAME
    return read_json(path) if path.is_file() else {}


def _processor_tokens(tokenizer: Path) -> dict[str, Any]:
    """Return the entries of ``tokenizer_config.json`` that name the processor and its tokens."""
    video = QWEN_VIDEO if QWEN_VIDEO in load_tokenizer(tokenizer).get_vocab() else _UNUSED
    extra = _tokenizer_settings(tokenizer).get("extra_special_tokens")
    names = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
    }
    return {
        "extra_special_tokens": {"video_token": video}
        | (extra if isinstance(extra, dict) else {})
        | names,
        "processor_class": _PROCESSOR,
    }


def _image_processor(architecture: Architecture, usage: Usage) -> dict[str, Any]:
    vision = architecture.vision
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": _PROCESSOR,
        "crop_to_patches": usage.crops,
        "min_patches": usage.min_tiles,
        "max_patches": usage.max_tiles,
        **pixel_settings(architecture),
        "size": {"height": vision.image_size, "width": vision.image_size},
    }


def tile_processor(architecture: Architecture, usage: Usage, kind: str) -> dict[str, Any]:
    """Return the settings of an image processor that makes one tile of an image.

    Args:
        architecture: of the model.
        usage: how images became tiles.
        kind: class that stretches images to squares.
    """
    side = architecture.vision.image_size
    square = {"height": side, "width": side}
    if usage.tiling in ("dynamic", "stretch"):
        shape: dict[str, Any] = {"size": square, "do_center_crop": False}
    else:
        kind = "LlavaImageProcessor" if usage.tiling == "pad" else "CLIPImageProcessor"
        shape = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        if usage.tiling == "pad":
            shape["do_pad"] = True
    return {"image_processor_type": kind, **pixel_settings(architecture), **shape}


def _video_processor(architecture: Architecture) -> dict[str, Any]:
    side = architecture.vision.image_size
    return {
        "video_processor_type": "InternVLVideoProcessor",
        "processor_class": _PROCESSOR,
        **pixel_settings(architecture),
        "size": {"height": side, "width": side},
    }


def pixel_settings(architecture: Architecture) -> dict[str, Any]:
    """How images are resized, and their pixels become numbers."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": RESAMPLES[architecture.vision.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(architecture.vision.pixel_mean),
        "image_std": list(architecture.vision.pixel_std),
    }
