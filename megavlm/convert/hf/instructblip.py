"""Folders of ``InstructBlipForConditionalGeneration`` but for the weights: config.json, and a
processor with two tokenizers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Architecture
from megavlm.convert.hf import blip2_config, blip2_processor, tokenizer_files
from megavlm.convert.hf.json_files import FILE_NAME, PROCESSOR_NAME, write_json
from megavlm.convert.hf.preprocessing import Usage
from megavlm.convert.hf.processor import write_generation
from megavlm.convert.hf.token_ids import TokenIds
from megavlm.data.text.templates import chat_format
from megavlm.data.text.tokenizer import QFORMER_TOKENIZER

CLASS_NAME = "InstructBlipForConditionalGeneration"
MODEL_TYPE = "instructblip"
FORM = "InstructBlipConfig"
PROCESSOR = "InstructBlipProcessor"
_TEMPLATE = "instructblip"


def read(raw: dict[str, Any], folder: Path, *, has_head: bool | None) -> Architecture:
    """Read the architecture; arguments and errors as in ``native_config``. How long instructions
    are stands in no file; it is the authors' 128 tokens, or as many as there are positions.
    """
    found = blip2_config.read(raw, folder, has_head=has_head, form=FORM, qformer={})
    qformer = found.connector.qformer
    longest = chat_format(_TEMPLATE).instruction_length
    tokens = min(longest, qformer.max_position_embeddings)
    qformer = replace(qformer, text=True, instruction_tokens=tokens)
    return replace(found, connector=replace(found.connector, qformer=qformer))


def read_usage(folder: Path) -> Usage:
    """Return how a model is to be used: an instruction behind one image, see
    ``blip2_processor.usage_of``.
    """
    return blip2_processor.usage_of(folder, _TEMPLATE)


def write(
    folder: Path, tokenizer: Path, architecture: Architecture, usage: Usage, dtype: torch.dtype
) -> None:
    """Write everything but weights, as ``AutoProcessor`` and the class read it; see
    ``processor.write_native``. The processor puts the placeholder tokens of an image before a text
    by itself.

    Raises:
        ValueError: the tokenizer's folder has no tokenizer of the Q-Former inside.
    """
    words = tokenizer / QFORMER_TOKENIZER
    if not words.is_dir():
        raise ValueError(
            f"--tokenizer {tokenizer}: {CLASS_NAME} has the tokenizer of its Q-Former in"
            f" {QFORMER_TOKENIZER}/ there; put that of the packs (--qformer_tokenizer) into it"
        )
    ids = write_generation(folder, tokenizer, architecture, usage)
    write_json(folder / FILE_NAME, config(architecture, ids, dtype))
    tokenizer_files.write(tokenizer, folder, {"processor_class": PROCESSOR})
    (folder / QFORMER_TOKENIZER).mkdir()
    tokenizer_files.copy(words, folder / QFORMER_TOKENIZER)
    blip2_processor.write_images(folder, architecture, usage, PROCESSOR)
    write_json(
        folder / PROCESSOR_NAME,
        {"processor_class": PROCESSOR, "num_query_tokens": architecture.placeholders_per_tile},
    )


def config(architecture: Architecture, ids: TokenIds, dtype: torch.dtype) -> dict[str, Any]:
    """Build the content of config.json; arguments as in ``native_config``."""
    own = {"architectures": [CLASS_NAME], "model_type": MODEL_TYPE}
    settings = blip2_config.write(architecture, ids, dtype) | own
    settings["vision_config"]["model_type"] = blip2_config.VISION_TYPES[1]
    settings["qformer_config"]["model_type"] = "instructblip_qformer"
    del settings["qformer_config"]["use_qformer_text_input"]
    return settings
