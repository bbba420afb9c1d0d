"""The same model as ``transformers`` computes it, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import class_of_transformers
from megavlm.data.loading.batch import Instructions


def instruction_inputs(instructions: Instructions | None, tiles: slice) -> dict[str, Tensor]:
    """Return what ``InstructBlipForConditionalGeneration`` reads beside tiles of a pack; nothing
    if there are none, or no instructions.
    """
    if instructions is None or not len(instructions.tokens[tiles]):
        return {}
    tokens = instructions.tokens[tiles]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    real = places < instructions.lengths[tiles, None]
    return {"qformer_input_ids": tokens, "qformer_attention_mask": real.long()}


def size_inputs(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return what ``LlavaNextForConditionalGeneration`` reads beside the tiles of images: their
    widths and heights, the other way round; nothing for other classes, or without images.
    """
    if model.config.model_type != "llava_next" or not len(sizes):
        return {}
    device = next(model.parameters()).device
    return {"image_sizes": torch.tensor([(height, width) for width, height in sizes]).to(device)}


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the model of a Hugging Face folder in the class of its format, such as
    ``InternVLForConditionalGeneration``, ready to be called, on the CPU.

    Raises:
        ValueError: there is no such model, or it is in the chat dialect, which transformers does
            not read by itself.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no Hugging Face model is there (config.json is missing)")
    row = hub_format_of(folder)
    if not row.is_in_transformers:
        raise ValueError(
            f"{folder}: in the format of {row.class_name}, which transformers does not read by"
            " itself; export it with another --dialect, such as native, if that holds the model"
        )
    form = class_of_transformers(row.class_name)
    return form.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
