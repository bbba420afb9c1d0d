"""Everything in a Hugging Face folder but the weights: config.json, tokenizer, chat template, image
processor, generation settings.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import chat_config, native_config
from megavlm.convert.hf.json_files import FILE_NAME, IMAGE_PROCESSOR_NAME, read_json, write_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.weights.tables import Dialect
from megavlm.data.text.chat_tokens import DEFAULT
from megavlm.data.text.templates import FORMATS, ChatFormat, chat_format
from megavlm.data.text.tokenizer import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_START,
    SPECIAL_TOKENS,
    first_tokens,
    load_tokenizer,
)

_TEMPLATE_NAME = "chat_template.jinja"
_BICUBIC = 3
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    _TEMPLATE_NAME,
)
# The processor wants a token for videos that texts do not hold. Qwen2.5's tokenizers have one.
# Elsewhere it is one of InternVL's that nothing uses, since a new token would make another
# tokenizer than the one that the model was trained with.
_VIDEO = "<|video_pad|>"
_UNUSED = "<quad>"
_PROCESSOR = "InternVLProcessor"


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Tokens that a model's settings name."""

    image: int
    end: int
    pad: int


def token_ids(folder: Path, architecture: Architecture, template: str) -> TokenIds:
    """Ids of the tokens that matter, in the tokenizer of a folder.

    Raises:
        ValueError: the tokenizer lacks one, or knows more tokens than the model.
    """
    tokenizer = load_tokenizer(folder)
    known = tokenizer.get_vocab()
    row = _format(template)
    missing = [token for token in (*SPECIAL_TOKENS, *row.markers) if token not in known]
    if missing:
        raise ValueError(
            f"--tokenizer {folder}: lacks {', '.join(missing)}; take the folder tokenizer/ of the"
            " packed dataset"
        )
    if max(known.values()) >= architecture.language.vocab_size:
        highest = max(known.values())
        rows = architecture.language.vocab_size
        raise ValueError(
            f"--tokenizer {folder}: has ids up to {highest}, and the model's vocabulary has {rows}"
            " rows"
        )
    end = tokenizer(row.end, add_special_tokens=False)["input_ids"][-1]
    return TokenIds(
        image=known[IMAGE_CONTEXT],
        end=end,
        pad=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )


def write_folder(
    folder: Path,
    dialect: Dialect,
    tokenizer: Path,
    architecture: Architecture,
    usage: Usage,
    dtype: torch.dtype,
) -> None:
    """Write everything but weights.

    Args:
        folder: the folder of the model.
        dialect: to write it in.
        tokenizer: folder of the tokenizer.
        architecture: the model.
        usage: its template and its tile limits.
        dtype: number format of the weights.

    Raises:
        ValueError: tokenizer and model do not fit, or the dialect has no such model.
    """
    ids = token_ids(tokenizer, architecture, usage.template)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file() and name != _TEMPLATE_NAME:
            shutil.copyfile(tokenizer / name, folder / name)
    write_json(
        folder / "generation_config.json", {"eos_token_id": ids.end, "pad_token_id": ids.pad}
    )
    (_write_native if dialect == "native" else _write_chat)(
        folder, tokenizer, architecture, usage, dtype, ids
    )


def _write_native(
    folder: Path,
    tokenizer: Path,
    architecture: Architecture,
    usage: Usage,
    dtype: torch.dtype,
    ids: TokenIds,
) -> None:
    """What ``AutoProcessor`` and ``InternVLForConditionalGeneration`` read."""
    tokens = dict(image_token_id=ids.image, eos_token_id=ids.end, pad_token_id=ids.pad)
    write_json(folder / FILE_NAME, native_config.write(architecture, dtype=dtype, **tokens))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    (folder / _TEMPLATE_NAME).write_text(
        _template(tokenizer, usage, with_images=True), encoding="utf-8"
    )
    write_json(folder / IMAGE_PROCESSOR_NAME, _image_processor(architecture, usage))
    write_json(folder / "video_preprocessor_config.json", _video_processor(architecture))
    write_json(
        folder / "processor_config.json",
        {"processor_class": _PROCESSOR, "image_seq_length": architecture.features_per_tile},
    )


def _write_chat(
    folder: Path,
    tokenizer: Path,
    architecture: Architecture,
    usage: Usage,
    dtype: torch.dtype,
    ids: TokenIds,
) -> None:
    """What OpenGVLab's ``InternVLChatModel`` and the programs that know it read."""
    settings = chat_config.write(
        architecture,
        dtype=dtype,
        eos_token_id=ids.end,
        pad_token_id=ids.pad,
        template=usage.template,
        min_tiles=usage.min_tiles,
        max_tiles=usage.max_tiles,
        thumbnail=usage.thumbnail,
    )
    write_json(folder / FILE_NAME, settings)
    words = _tokenizer_settings(tokenizer)
    words.pop("processor_class", None)
    # The transformers of that time reads the template from here.
    write_json(
        folder / "tokenizer_config.json",
        words | {"chat_template": _template(tokenizer, usage, with_images=False)},
    )
    side = architecture.vision.image_size
    vision = architecture.vision
    image_processor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": side,
        "do_center_crop": True,
        "crop_size": side,
        "resample": _BICUBIC,
        "do_normalize": True,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    write_json(folder / IMAGE_PROCESSOR_NAME, image_processor)


def _template(tokenizer: Path, usage: Usage, *, with_images: bool) -> str:
    """The chat template: InternVL's, unless the model was not trained here and its tokenizer has
    one (that knows images, if it must).
    """
    own = tokenizer / _TEMPLATE_NAME
    found = (
        own.read_text(encoding="utf-8")
        if own.is_file()
        else _tokenizer_settings(tokenizer).get("chat_template")
    )
    keeps = (
        isinstance(found, str)
        and not usage.is_trained
        and (IMAGE_CONTEXT in found or not with_images)
    )
    if keeps:
        return found
    return _format(usage.template).hf_template(
        system_message=usage.system_message, bos=bool(first_tokens(load_tokenizer(tokenizer)))
    )


def _format(template: str) -> ChatFormat:
    """The row of a template; of one that is not in the table, as folders of other models may name,
    InternVL 2.5's.
    """
    return chat_format(template if template in FORMATS else DEFAULT)


def _tokenizer_settings(tokenizer: Path) -> dict[str, Any]:
    path = tokenizer / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _tokenizer_config(tokenizer: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` with the names under which the processor looks for its tokens."""
    settings = _tokenizer_settings(tokenizer)
    settings.pop("chat_template", None)
    extra = settings.pop("extra_special_tokens", None) or []
    named = dict(extra) if isinstance(extra, dict) else {}
    listed = settings.pop("additional_special_tokens", None) or ([] if named else extra)
    names = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": IMAGE_CONTEXT,
    }
    video = _VIDEO if _VIDEO in load_tokenizer(tokenizer).get_vocab() else _UNUSED
    # transformers 4 and 5 both read names from the one entry, and plain special tokens from the
    # other.
    return settings | {
        "additional_special_tokens": listed,
        "extra_special_tokens": {"video_token": video} | named | names,
        "processor_class": _PROCESSOR,
    }


def _image_processor(architecture: Architecture, usage: Usage) -> dict[str, Any]:
    vision = architecture.vision
    return {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": _PROCESSOR,
        "crop_to_patches": True,
        "min_patches": usage.min_tiles,
        "max_patches": usage.max_tiles,
        **_pixels(architecture),
        "size": {"height": vision.image_size, "width": vision.image_size},
    }


def _video_processor(architecture: Architecture) -> dict[str, Any]:
    side = architecture.vision.image_size
    return {
        "video_processor_type": "InternVLVideoProcessor",
        "processor_class": _PROCESSOR,
        **_pixels(architecture),
        "size": {"height": side, "width": side},
    }


def _pixels(architecture: Architecture) -> dict[str, Any]:
    """How pixels become numbers."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(architecture.vision.pixel_mean),
        "image_std": list(architecture.vision.pixel_std),
    }
