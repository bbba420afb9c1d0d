"""The table of weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megavlm.config.models import MODELS
from megavlm.config.schema import Architecture
from megavlm.convert.hf import name_on_disk
from megavlm.convert.model_config import hf_config
from megavlm.convert.tables import megatron_shapes, rows
from tests.convert.models import KINDS


def transformers_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    settings = hf_config(architecture, dtype=torch.bfloat16, image_token_id=90, eos_token_id=1, pad_token_id=2)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig.from_dict(settings))
    return {name_on_disk(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("architecture", [*KINDS.values(), *MODELS.values()], ids=[*KINDS, *MODELS])
def test_names_and_shapes_are_those_of_transformers(architecture: Architecture) -> None:
    table = rows(architecture)
    pairs = [pair for row in table for pair in zip(row.names, row.part_shapes, strict=True)]
    assert len(pairs) == len(dict(pairs)) and len(table) == len(megatron_shapes(architecture))
    assert dict(pairs) == transformers_shapes(architecture)


def test_operations_and_tables_need_neither_megatron_nor_transformers() -> None:
    code = "import sys, megavlm.convert.ops, megavlm.convert.tables; print([m for m in ('megatron', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
