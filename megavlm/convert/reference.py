"""The same model as ``transformers`` computes it, to compare with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``InternVLForConditionalGeneration`` with the weights of a Hugging Face folder, ready to be called, on the CPU.

    Raises:
        ValueError: there is no such model.
    """
    from transformers import InternVLForConditionalGeneration

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no Hugging Face model is there (config.json is missing)")
    return InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
